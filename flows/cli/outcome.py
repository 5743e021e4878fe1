"""How a command ends: its exit status, and each error as one message."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantlib.errors import QuantflowError, StoreError, explain_refusal, is_interrupt

if TYPE_CHECKING:
    from quantlib.report.results import Report

_INTERRUPTED = "Interrupted. Run the same command again: finished stages are kept."


REGRESSION, NO_WINNER, WRONG_INPUT, FAILURE, INTERRUPTED = 4, 3, 2, 1, 130


def reports_errors(command: Callable[..., int]) -> Callable[..., None]:
    """Turn a command's errors into one message and an exit status."""

    @wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> None:
        try:
            status = command(*args, **kwargs)
        except (click.UsageError, BrokenPipeError):
            raise  # click shows the first and ends quietly on the second (`quantflow recipes | head -1`).
        except KeyboardInterrupt:
            status = complain(_INTERRUPTED, INTERRUPTED)
        except Exception as error:
            status = explain(error, kwargs.get("home"), verbose=bool(kwargs.get("verbose")))
        sys.exit(status)

    return run_command


def explain(error: Exception, home: Path | None, *, verbose: bool, prefix: str = "") -> int:
    """Print why a command failed; return the exit status.

    Args:
        error: What was raised.
        home: The home folder, if the command has one.
        verbose: Show the traceback of an error that quantflow itself did not raise.
        prefix: Put before the message.
    """
    if isinstance(error, QuantflowError):
        return complain(prefix + str(error), FAILURE if isinstance(error, StoreError) else WRONG_INPUT)
    if is_interrupt(error):
        return complain(_INTERRUPTED, INTERRUPTED)
    refusal = explain_refusal(error, error.filename or home) if isinstance(error, OSError) else None
    if refusal is not None:
        return complain(prefix + str(refusal), WRONG_INPUT)
    if verbose:
        traceback.print_exception(error)
    hint = "" if verbose else " Run with --verbose for the traceback."
    message = f"{prefix}{type(error).__name__}: {error}\nThis is a bug in quantflow or in what it uses.{hint}"
    return complain(message, FAILURE)


def status_of(report: Report) -> int:
    """The exit status of a run that finished."""
    if report.winner is None:
        return NO_WINNER
    return REGRESSION if report.regression else 0


def warn(message: str) -> None:
    """Print a message on standard error."""
    click.echo(f"quantflow: {message}", err=True)


def complain(message: str, status: int) -> int:
    """Print what went wrong; return the exit status."""
    warn(message)
    return status
