"""Whether and where a dashboard runs on a home: a file, and a lock that the kernel releases with the process."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from quantlib.errors import MachineError
from quantlib.files import lockable, read_file, write_atomically


@contextmanager
def claim(home: Path) -> Iterator[None]:
    """Be the dashboard of a home inside the block.

    Raises:
        MachineError: If it has one already.
    """
    lock = _lock(home)
    try:
        # Asking whether a dashboard runs also takes the lock for a moment.
        lock.acquire(timeout=2)
    except Timeout:
        raise MachineError(
            f"A dashboard for {home} is already running{_where(home)}. Open it in a browser, stop it with Ctrl-C where "
            "it was started, or choose another home with --home."
        ) from None
    try:
        yield
    finally:
        _file(home).unlink(missing_ok=True)
        lock.release()


def announce(home: Path, url: str) -> None:
    """Publish the dashboard's address; only for the process that has claimed the home."""
    write_atomically(_file(home), json.dumps({"url": url, "pid": os.getpid()}).encode())


def find_dashboard(home: Path) -> str | None:
    """The API address of the dashboard that runs on a home; None if none runs, or not yet."""
    url = _read(home).get("url")
    if url is None:
        return None
    try:
        with _lock(home).acquire(timeout=0):
            return None  # Its process died and left the file.
    except Timeout:
        return str(url)


def _where(home: Path) -> str:
    found = _read(home)
    return f" at {found['url'].removesuffix('/api')} (process {found['pid']})" if {"url", "pid"} <= set(found) else ""


def _read(home: Path) -> dict[str, str]:
    try:
        found = json.loads(read_file(_file(home)))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file(home: Path) -> Path:
    return home / "prefect" / "dashboard.json"


def _lock(home: Path) -> FileLock:
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    # Not a singleton per process: a dashboard must be seen from inside its own process, too.
    return FileLock(lockable(folder / "dashboard.lock"), is_singleton=False)
