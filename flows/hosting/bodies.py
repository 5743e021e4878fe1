"""Checks the body of every request to Prefect's API.

Prefect stores half a character (a lone surrogate), or values nested hundreds deep, and then fails to send them back:
one run with such a value keeps every page from listing runs, and every worker from getting further runs.
"""

import json
import math
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MAX_DEPTH = 50
_MAX_BYTES = 64 * 1024 * 1024


def refuse_what_cannot_be_told(app: "ASGIApp") -> "ASGIApp":
    """An ASGI application that refuses, with status 422, JSON that Prefect would store and could not send back."""
    from starlette.responses import JSONResponse

    async def guarded(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http" or scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            await app(scope, receive, send)
            return
        messages, body = await _read(receive)
        fault = _fault(body)
        if fault is not None:
            await JSONResponse({"detail": f"Refused: {fault}."}, status_code=422)(scope, receive, send)
            return

        async def again() -> "Message":
            return messages.pop(0) if messages else await receive()

        await app(scope, again, send)

    return guarded


async def _read(receive: "Receive") -> tuple[list["Message"], bytes]:
    """All messages of a request's body, or those up to the size limit; and their content."""
    messages: list[Message] = []
    body = b""
    while len(body) <= _MAX_BYTES:
        message = await receive()
        messages.append(message)
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return messages, body


def _fault(body: bytes) -> str | None:
    """What is wrong with a body; None also if it is not JSON, which Prefect itself refuses."""
    if len(body) > _MAX_BYTES:
        return f"a request may have at most {_MAX_BYTES} bytes"
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        return f"tables and lists may be nested {_MAX_DEPTH} deep"
    except _NoNumberError as error:
        return str(error)
    except ValueError:
        return None
    return _fault_in(value, 0)


def _fault_in(value: Any, depth: int) -> str | None:
    if isinstance(value, str):
        return None if value.isascii() or _is_whole(value) else f"{value[:20]!r} holds half a character"
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "a whole number may have at most 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "a number must be finite"
    if isinstance(value, dict | list):
        if depth == _MAX_DEPTH:
            return f"tables and lists may be nested {_MAX_DEPTH} deep"
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((fault for part in parts if (fault := _fault_in(part, depth + 1)) is not None), None)
    return None


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _NoNumberError(Exception):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NoNumberError(f"{name} is not a number in JSON")
