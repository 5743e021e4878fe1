"""Makes a server on loopback answer only requests to its own address, and no web page but its own.

Whoever can call Prefect's API can run programs as its user, and Prefect answers every page that a browser has open. A
page cannot choose what the browser says about it: where it was loaded from (Origin, Sec-Fetch-Site), and which host it
calls (Host), which gives away a foreign name that was made to point to loopback (DNS rebinding).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Receive, Scope, Send


def answer_own_pages_only(app: "ASGIApp", port: int) -> "ASGIApp":
    """An ASGI application that refuses requests to another host, or from another page.

    HTTP is refused with status 403, a WebSocket before it is opened.

    Args:
        app: Application that gets all other requests.
        port: Port that it listens on at 127.0.0.1.
    """
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse

    hosts = _own_hosts(port)

    async def guarded(scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan" or _is_own(Headers(scope=scope), scope.get("method"), hosts):
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = PlainTextResponse(
                "Refused: this server only answers requests to its own address, and only from its own pages. "
                f"Open http://127.0.0.1:{port} itself.",
                status_code=403,
            )
            await refusal(scope, receive, send)

    return guarded


def _own_hosts(port: int) -> frozenset[str]:
    """The host names that a client on this machine uses for the server."""
    # Browsers leave out the port if it is HTTP's default.
    suffixes = [f":{port}", ""] if port == 80 else [f":{port}"]
    return frozenset(f"{name}{suffix}" for name in ("127.0.0.1", "localhost") for suffix in suffixes)


def _is_own(headers: "Headers", method: str | None, hosts: frozenset[str]) -> bool:
    asked = headers.getlist("host")
    if len(asked) != 1 or asked[0].lower() not in hosts:
        return False
    origins = headers.getlist("origin")
    if origins:
        return len(origins) == 1 and origins[0] in {f"http://{host}" for host in hosts}
    # Prefect's clients send none of these headers.
    if headers.get("sec-fetch-site", "none") in {"none", "same-origin"}:
        return True
    # Another page may link to the dashboard, but may neither load parts of it nor frame it.
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return is_link and method in {"GET", "HEAD"}
