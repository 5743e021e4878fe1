"""Processes that a command starts, watches, and stops together with everything that they started."""

import atexit
import contextlib
import ctypes
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from quantlib.errors import MachineError

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_PARENT = "QUANTFLOW_PARENT"
_MAX_STARTS = 5
_MAX_STARTS_SECONDS = 120.0


class Child:
    """A process that is restarted when it exits by itself.

    Args:
        name: Name in messages.
        command: Command to run.
        environment: The complete environment.
        log: File for the output of the process.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._environment = environment
        self._starts: list[float] = []
        self.process = self._start()

    def watch(self) -> bool:
        """Restart the process if it has exited; return whether it had.

        Raises:
            MachineError: If it keeps exiting.
        """
        if self.process.poll() is None:
            return False
        now = time.monotonic()
        self._starts = [start for start in self._starts if now - start < _MAX_STARTS_SECONDS]
        if len(self._starts) >= _MAX_STARTS:
            raise MachineError(f"The {self.name} keeps exiting (exit status {self.process.returncode}): {self.tail()}")
        self.process = self._start()
        return True

    def stop(self, seconds: float) -> None:
        """Ask the process to exit, and kill it if it does not."""
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tail(self) -> str:
        """The last line that it printed, and the path of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        return f"{lines[-1]} (its log is {self.log})"

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts.append(time.monotonic())
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            # In its own session: Ctrl-C in the terminal reaches only the command, which stops everything in order.
            return subprocess.Popen(  # noqa: S603 (our own modules)
                self._command,
                # The child may start watching only after this process has died.
                env={**self._environment, _PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def end_with_parent() -> None:
    """In a `Child`'s process: exit as soon as the process that started it is gone, for whatever reason."""
    parent = int(os.environ[_PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class Pulse:
    """Whether a live process is still doing its work.

    Args:
        beats: Asks for a sign of life.
        seconds: After this long without one, the process counts as silent.
    """

    def __init__(self, beats: Callable[[], bool], seconds: float) -> None:
        self._beats = beats
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Start counting again, for a process that was just started."""
        self._last = time.monotonic()

    def is_silent(self) -> bool:
        """Whether there was no sign of life for too long; asks for one once half of that time has passed."""
        if time.monotonic() - self._last > self._seconds / 2 and self._beats():
            self.reset()
        return time.monotonic() - self._last > self._seconds


class RepeatedErrors:
    """Finds errors that repeat among the lines added to a log.

    Args:
        log: A text file, which need not exist yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = log.stat().st_size if log.exists() else 0
        self._counts: Counter[str] = Counter()

    def news(self) -> list[str]:
        """The new lines that name an error for the second time; each error is returned once."""
        with contextlib.suppress(FileNotFoundError), self._log.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
            self._read += len(whole) + len(newline)
            return [line for line in whole.decode(errors="replace").splitlines() if self._is_second(line)]
        return []

    def _is_second(self, line: str) -> bool:
        if not re.match(r"[\w.]*(Error|Exception)\b", line):
            return False
        # Ports, durations and ids differ each time.
        kind = re.sub(r"[0-9a-f-]*\d[0-9a-f-]*", "#", line)
        self._counts[kind] += 1
        return self._counts[kind] == 2


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection inside the block, and exempt from it for good what the block creates.

    For imports: nearly everything they create stays, and looking for the rest took a fifth of a server's start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # Otherwise libraries that count their objects at exit complain about what was never collected.
        atexit.register(gc.unfreeze)


def adopt_orphans() -> None:
    """Become the parent of the processes that a dying child leaves behind (Linux), so that none is lost."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(own: Iterable[int]) -> None:
    """Reap adopted processes that have exited.

    Args:
        own: Children that other code waits for.
    """
    for pid in set(_children().get(os.getpid(), [])) - set(own):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def descendants(pid: int) -> list[int]:
    """Every descendant of a process, without itself; none if the system has no /proc."""
    children = _children()
    found, unseen = [], [pid]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def end_all(pids: Iterable[int], seconds: float) -> None:
    """Ask processes to exit, and kill those that do not."""
    left = set(pids)
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 1.0)):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = {pid for pid in left if is_alive(pid)}


def end(status: int) -> NoReturn:
    """End this process as `sys.exit` does, but leave its memory to the kernel.

    Freeing the modules of torch and Prefect object by object took longer than a second.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # The reader is gone.
            stream.flush()
    os._exit(status)


def is_alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _children() -> dict[int, list[int]]:
    """The child processes of each parent, by pid."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The second field is the program's name in brackets, which may hold anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(stat.parent.name))
    return found
