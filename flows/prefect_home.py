"""Prefect's settings for a command: set as environment variables, because Prefect reads them when it is imported."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def prefect_home(home: Path, *, verbose: bool) -> Iterator[None]:
    """Keep Prefect's files under `home` inside the block, and Prefect itself quiet.

    Without a server of its own (PREFECT_API_URL), a process starts one for itself, on a database in `home`. Two such
    servers on one database lose each other's states, so whoever comes second has a database of its own, for as long
    as it runs: the run is the same, only its history is not kept.

    Args:
        home: quantflow's home folder.
        verbose: Show Prefect's own log.
    """
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "server.lock")
    with tempfile.TemporaryDirectory(prefix="quantflow-") as alone:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            folder = Path(alone)
        settings = {
            "PREFECT_HOME": str(folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            # A machine that is busy needs more than the usual 20 s.
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        }
        if not verbose:
            settings["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
        os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
        try:
            yield
        finally:
            lock.release()
