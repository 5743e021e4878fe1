"""How a command ends: its exit status, and each error as one message."""

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from quantlib.errors import QuantflowError, StoreError, explain_refusal, is_interrupt

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
        except StoreError as error:
            status = complain(str(error), FAILURE)
        except QuantflowError as error:
            status = complain(str(error), WRONG_INPUT)
        except KeyboardInterrupt:
            status = complain(_INTERRUPTED, INTERRUPTED)
        except Exception as error:
            status = _explain(error, kwargs.get("home"), verbose=bool(kwargs.get("verbose")))
        sys.exit(status)

    return run_command


def _explain(error: Exception, home: Path | None, *, verbose: bool) -> int:
    """Explain an error that quantflow itself did not raise; return the exit status."""
    if is_interrupt(error):
        return complain(_INTERRUPTED, INTERRUPTED)
    refusal = explain_refusal(error, error.filename or home) if isinstance(error, OSError) else None
    if refusal is not None:
        return complain(str(refusal), WRONG_INPUT)
    if verbose:
        traceback.print_exception(error)
    hint = "" if verbose else " Run with --verbose for the traceback."
    return complain(f"{type(error).__name__}: {error}\nThis is a bug in quantflow or in what it uses.{hint}", FAILURE)


def warn(message: str) -> None:
    """Print a message on standard error."""
    click.echo(f"quantflow: {message}", err=True)


def complain(message: str, status: int) -> int:
    """Print what went wrong; return the exit status."""
    warn(message)
    return status
