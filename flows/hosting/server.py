"""The Prefect server that a command starts for itself if PREFECT_API_URL names none.

Prefect can start one, too; but that one outlives a killed process, and starts only when it is first needed. This one
starts during the imports, and ends with its parent.
"""

import json
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flows.hosting.dashboard_lock import find_dashboard
from flows.hosting.database import prepare_database
from flows.hosting.processes import Child, Pulse, end_with_parent, gc_paused
from quantlib import temporary
from quantlib.errors import MachineError, explain_full_disk
from quantlib.files import lockable

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_WATCH_SECONDS = 0.5
# A server that shares the cores with torch may take seconds to answer, but never this long.
_SILENT_SECONDS = 30.0


@contextmanager
def prefect_server(home: Path, say: Callable[[str], None], *, verbose: bool) -> Iterator[Callable[[], None] | None]:
    """Set Prefect up for the process, and start a server unless PREFECT_API_URL names one, or a dashboard runs.

    Prefect reads its settings from the environment when it is imported: nothing may import it before this.
    Two servers on one database lose each other's states. So the second run on a home keeps Prefect's files in its own
    temporary folder: the run is the same, only Prefect forgets it.

    Args:
        home: quantflow's home folder; Prefect's files are below it.
        say: Called if the server is gone for good: the run continues without it.
        verbose: Show Prefect's own log.

    Yields:
        A function that waits until the server answers; None if there is nothing to wait for.

    Raises:
        MachineError: If something else stands in the lock file's place; from the yielded function, if the server does
            not start.
    """
    folder = home / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lockable(folder / "server.lock"))
    with temporary.new_folder() as alone:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            folder = alone
        set_defaults(folder, verbose=verbose)
        # Enough for a restart of the server on a busy machine, 30 s: with 14 s, one of 33 runs whose server was killed
        # failed. A run whose server is gone for good still ends soon after its work.
        os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "4")
        try:
            if "PREFECT_API_URL" in os.environ:
                yield None
            elif (url := find_dashboard(home)) is not None:
                with _use(url):
                    yield None
            else:
                with start(folder, say) as wait:
                    yield wait
        finally:
            lock.release()


def set_defaults(folder: Path, *, verbose: bool) -> None:
    """Put Prefect's settings into the environment before anything imports it; keep those that the user has set.

    Args:
        folder: Prefect's home; created, as Prefect itself creates it only in a folder that exists.
        verbose: Show Prefect's own log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "PREFECT_HOME": str(folder),
        # Nothing is sent anywhere.
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # One of Prefect's dependencies checks types at run time, and compiles itself for that at each start.
        "PY_KEY_VALUE_DISABLE_BEARTYPE": "true",
    }
    if not verbose:
        settings["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
        # It logs each event that is not delivered, with its whole content.
        settings["PREFECT_LOGGING_INTERNAL_LEVEL"] = "CRITICAL"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


@contextmanager
def _use(url: str) -> Iterator[None]:
    os.environ["PREFECT_API_URL"] = url
    try:
        yield
    finally:
        drain()
        del os.environ["PREFECT_API_URL"]


@contextmanager
def start(folder: Path, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Start a server with its database in `folder`, like `prefect_server`, but without looking for other servers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = folder / "server.log"
    # Only those of Prefect's services that a short-lived server needs. A later dashboard registers Prefect's blocks, so
    # this server must not record that as done.
    switches = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_API_BLOCKS_REGISTER_ON_START": "0",
        "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "0",
    }
    environment = {**os.environ, **switches, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING"}
    log.unlink(missing_ok=True)  # Its last line is shown if the server does not start.
    # In its own session: Ctrl-C in the terminal reaches only the run, which reports to the server how it ended.
    server = Child("server", [sys.executable, "-m", "flows.hosting.server", str(port)], environment, log)
    keeper = _Keeper(server, url, say)

    def wait() -> None:
        wait_until_healthy(server, url)
        keeper.start()

    os.environ["PREFECT_API_URL"] = url
    try:
        yield wait
    finally:
        # While the server is still there, above all if the block fails.
        if keeper.stop():
            drain()
        del os.environ["PREFECT_API_URL"]
        server.stop(_STOP_SECONDS)


class _Keeper:
    """Restarts a server that has died or no longer answers; clients retry meanwhile.

    A server that keeps dying is given up: the run continues without it, and Prefect's history of it has a gap.
    """

    def __init__(self, server: Child, url: str, say: Callable[[str], None]) -> None:
        self._server = server
        self._pulse = Pulse(lambda: is_healthy(url), _SILENT_SECONDS)
        self._say = say
        self._stopped = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._pulse.reset()
        self._thread.start()

    def stop(self) -> bool:
        """Stop watching; return whether there still is a server."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        return not self._lost

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_SECONDS):
            try:
                if self._server.watch():
                    self._pulse.reset()
            except MachineError as error:
                self._lost = True
                self._say(f"The run continues without Prefect's server; only its history there is lost. {error}.")
                return
            if self._pulse.is_silent():
                self._server.process.kill()


def is_healthy(url: str) -> bool:
    """Whether the API at `url` reports within 5 s that it is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310 (loopback)
            return json.load(answer) is True
    except (OSError, ValueError):
        return False


def wait_until_healthy(server: Child, url: str) -> None:
    """Wait until a server answers at `url`; if something kills it, restart it.

    Raises:
        MachineError: If it exits or does not answer in time; with the last line of its log.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if is_healthy(url):
            return
        status = server.process.poll()
        if status is not None and status >= 0:
            break
        server.watch()
        time.sleep(0.02)
    folder = server.log.parent
    raise explain_full_disk(folder) or MachineError(
        f"Prefect's server does not start: {server.tail()}. If its database is damaged, remove {folder}: only "
        "Prefect's history is lost, no stage and no report."
    )


def drain() -> None:
    """Send what Prefect's threads still hold, the last states included."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        EventsWorker.drain_all(timeout=_STOP_SECONDS, at_exit=False)
        APILogWorker.drain_all(timeout=_STOP_SECONDS, at_exit=False)


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(port: int) -> None:
    end_with_parent()
    with gc_paused():
        prepare_database()
        import uvicorn
        from prefect.server.api.server import create_app

        from flows.hosting.bodies import refuse_what_cannot_be_told
        from flows.hosting.origins import answer_own_pages_only

        app = answer_own_pages_only(refuse_what_cannot_be_told(create_app()), port)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
