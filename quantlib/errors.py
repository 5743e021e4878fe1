"""Errors that a user can cause and fix.

Each message says what was given, what is allowed and what to do.

    QuantflowError
    ├── RecipeError      the recipe is wrong: a key, a value, a combination
    ├── DataError        the dataset is missing, inconsistent or unreadable
    ├── ModelError       the architecture or its weights do not fit
    ├── MachineError     this machine lacks what was asked for: an engine, disk space, a download
    └── StoreError       an artifact is missing or damaged
"""

import difflib
import errno
import shutil
from collections.abc import Iterable
from pathlib import Path


class QuantflowError(Exception):
    """Base of every error that quantflow raises on purpose."""


class RecipeError(QuantflowError):
    """The recipe is wrong: an unknown key, a value out of range, a combination that cannot work."""


class DataError(QuantflowError):
    """The dataset is missing, inconsistent or unreadable."""


class ModelError(QuantflowError):
    """The architecture or its weights do not fit the recipe."""


class MachineError(QuantflowError):
    """This machine lacks what was asked for: an engine, disk space, a download."""


class StoreError(QuantflowError):
    """An artifact is missing from the store, or damaged."""


# With less free space, a database and its log cannot be written.
_ROOM_BYTES = 2 * 1024 * 1024
# Refusals by the operating system that a user can fix.
_ROOM = "Free some space, or choose another folder with --home, then run again: finished stages are kept."
_ACCESS = "No permission to read or write {place}: change its permissions, or choose another folder with --home."
_REFUSALS = {
    errno.ENOSPC: f"The disk is full: nothing more can be written below {{place}}. {_ROOM}",
    errno.EDQUOT: f"The disk quota is used up: nothing more can be written below {{place}}. {_ROOM}",
    errno.EROFS: "This folder is read-only: choose another with --home: {place}.",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.ENAMETOOLONG: "A name is too long for this file system: choose a shorter one. It was: {place}.",
    errno.ENOTDIR: "A file is where a folder is needed: remove it, or choose another folder with --home: {place}.",
    errno.EISDIR: "A folder is where a file is needed: remove it, or choose another folder with --home: {place}.",
    errno.EMFILE: "Too many files are open, so {place} could not be opened: raise the limit (ulimit -n).",
}


def explain_refusal(error: OSError, place: object) -> MachineError | None:
    """An error that says what to do about a refusal by the operating system; None if a user cannot fix it.

    Args:
        error: The refusal, as raised.
        place: The file or folder it is about.
    """
    message = _REFUSALS.get(error.errno or 0)
    return MachineError(message.format(place=place)) if message else None


def explain_full_disk(place: Path) -> MachineError | None:
    """A full-disk error for a failure that did not say why; None while there is room.

    Args:
        place: A folder on the disk that may be full.
    """
    try:
        room = shutil.disk_usage(place).free
    except OSError:
        return None
    return explain_refusal(OSError(errno.ENOSPC, ""), place) if room < _ROOM_BYTES else None


def suggest(got: str, allowed: Iterable[str]) -> str:
    """The end of a sentence, with the closest of `allowed` if one is close."""
    nearest = difflib.get_close_matches(got, list(allowed), n=1)
    return f" (did you mean {nearest[0]!r}?)." if nearest else "."


def is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error: a compiled module whose import is interrupted raises ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def reason_of(error: Exception) -> str:
    """The line of an error's message that says why; the error's type if it has no message.

    Raises:
        KeyboardInterrupt: If Ctrl-C caused the error, which then says nothing about what was tried.
    """
    if is_interrupt(error):
        raise KeyboardInterrupt from error
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # TorchScript's interpreter says what happened last.
    return lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
