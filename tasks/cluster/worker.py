"""What a Dask worker is asked to do, by name: say what it has, and compute stages in processes that it can kill."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import quantlib
import tasks
from quantlib.errors import QuantflowError
from quantlib.process import start_child
from quantlib.runtimes import available
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from quantlib.store.opening import open_store
from tasks.run import home_folder

if TYPE_CHECKING:
    from distributed import Worker

TOPIC = "quantflow-"
OTHER_CODE = "other code"
_POLL_SECONDS = 0.25
# A stage that prints in a loop must not fill the scheduler's memory.
_MAX_LOG_LINES = 200


def describe(probe: str) -> str:
    """What this machine is, as JSON: its facts, its home, whether its store has an artifact; or an `error`.

    Args:
        probe: The artifact's fields, as JSON.
    """
    home = home_folder()
    try:
        facts = asdict(available.this_machine())
        return json.dumps({"machine": facts, "home": str(home), "holds": _store().holds(Ref(**json.loads(probe)))})
    except (QuantflowError, OSError) as error:
        return json.dumps({"error": str(error), "home": str(home)})


def find_paths(paths: str) -> str:
    """Which of these paths exist on this machine, by path.

    Args:
        paths: A list, as JSON; so is the answer.
    """
    return json.dumps({path: Path(path).exists() for path in json.loads(paths)})


def compute(request: str) -> str:
    """Compute a stage in a child process.

    Args:
        request: What `child.answer` takes, as JSON; with `id`, which names the topic of its events, and `alone`.

    Returns:
        Its answer, as JSON, with the number of events; `died` is the exit status of a child that gave none.
    """
    asked = json.loads(request) | {"home": str(home_folder())}
    call = _Call(asked["id"])
    with _room(call, alone=asked["alone"]):
        answer = _ask(asked, call)
        if answer.get("error") == OTHER_CODE and not call.is_cancelled():
            # The child may have read a module of the user's before it was changed.
            _end_idle()
            answer = _ask(asked, call)
    return json.dumps(answer | {"num_events": call.num_events})


class _Call:
    """A call of `compute`, as Dask sees it."""

    def __init__(self, identity: str) -> None:
        from distributed import get_worker

        self._worker: Worker = get_worker()
        self._key = self._worker.get_current_task()
        self._topic = TOPIC + identity
        self.num_events = 0

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event to the driver."""
        self._worker.log_event(self._topic, event)
        self.num_events += 1

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the result any more: it was cancelled, or the driver is gone."""
        state = self._worker.state.tasks.get(self._key)
        return state is None or state.state != "executing"


class _Child:
    """A process that computes, and the lines that it has printed."""

    def __init__(self, sources: str) -> None:
        self.sources = sources
        """The state of the code that it has loaded, or will load."""
        self.process = start_child("tasks.cluster.child", keep_log=True)
        assert self.process.stdin is not None
        self._requests = self.process.stdin
        self.lines: queue.Queue[tuple[str, str]] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(name, cast("IO[str]", file)), daemon=True)
            for name, file in (("answer", self.process.stdout), ("log", self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def ask(self, request: dict[str, Any], call: _Call) -> dict[str, Any]:
        """The child's answer, or `died`; it is killed if the call is cancelled."""
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            return {"died": self.end()}
        num_lines, looked = 0, time.monotonic()
        while True:
            if time.monotonic() - looked > _POLL_SECONDS:
                looked = time.monotonic()
                if call.is_cancelled():
                    return {"died": self.end()}
            try:
                name, line = self.lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if name == "log":
                num_lines += 1
                if line and num_lines <= _MAX_LOG_LINES:
                    call.tell({"log": line})
            elif not line:
                return {"died": self.end()}
            elif {"outputs", "error"} & (message := json.loads(line)).keys():
                return cast("dict[str, Any]", message)
            else:
                call.tell(message)

    def end(self) -> int:
        """Kill the process, if it still runs; return its exit status, negative for a signal."""
        self.process.kill()
        with suppress(BrokenPipeError):
            self._requests.close()
        for reader in self._readers:
            reader.join()
        return self.process.wait()

    def _read(self, name: str, file: IO[str]) -> None:
        with file:
            for line in file:
                self.lines.put((name, line.rstrip("\n")))
        self.lines.put((name, ""))


_IDLE: list[_Child] = []
_LOCK = threading.Lock()


def _ask(request: dict[str, Any], call: _Call) -> dict[str, Any]:
    """The answer of a child whose code is that of the files as they are now."""
    while True:
        child = _take(_sources())
        answer = child.ask(request, call)
        if "died" in answer:
            return answer
        # The child may have imported a module that was changed meanwhile.
        if child.sources == _sources():
            with _LOCK:
                _IDLE.append(child)
            return answer
        child.end()


def _take(sources: str) -> _Child:
    with _LOCK:
        while _IDLE:
            child = _IDLE.pop()
            if child.sources == sources and child.process.poll() is None:
                return child
            child.end()
    return _Child(sources)


def _end_idle() -> None:
    with _LOCK:
        while _IDLE:
            _IDLE.pop().end()


def _sources() -> str:
    """The state of quantflow's own files, and of the folder of installed libraries, without reading them."""
    libraries = Path(sysconfig.get_path("purelib"))
    state = [f"{libraries} {libraries.stat().st_mtime_ns}"]
    for package in (quantlib, tasks):
        for path in sorted(Path(str(package.__path__[0])).rglob("*.py")):
            status = path.stat()
            state.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(state)


@contextmanager
def _room(call: _Call, *, alone: bool) -> Iterator[None]:
    """Keep this machine to one call during the block, or share it with others that do not need it alone.

    Two drivers may use the machine, or two workers run on it. The locks are flock(2)s, which the kernel releases when
    their process ends.
    """
    # Who wants the machine alone holds the gate while those inside finish.
    with (
        _locked("gate", fcntl.LOCK_EX, call) as gate,
        _locked("room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH, call),
    ):
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@contextmanager
def _locked(name: str, operation: int, call: _Call) -> Iterator[int]:
    place = Path(tempfile.gettempdir()) / f"quantflow-{os.geteuid()}-{name}.lock"
    file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        while not call.is_cancelled():
            try:
                fcntl.flock(file, operation | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL_SECONDS / 5)
        yield file
    finally:
        os.close(file)


def _store() -> Store:
    return open_store(home_folder())
