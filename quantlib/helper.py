"""A process that computes functions for another one, beside it.

    python -m quantlib.helper FILE_DESCRIPTOR

It is started by `Helper`, and ends when the pipe to that is closed: however the other process ends.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from quantlib.errors import MachineError

_LOOK_SECONDS = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class Helper:
    """The process, as the other one sees it; it is started by the first call, or by `start`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._num_stops = 0

    def start(self) -> None:
        """Start it, so that it is there when it is needed."""
        with self._lock:
            self._start()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a function of a module gives; what it raises is raised here. Threads take turns.

        A process that dies over it is replaced once, so the function may begin twice.

        Raises:
            MachineError: If the process dies again, or is stopped.
        """
        with self._lock:
            num_stops = self._num_stops
            for is_last in (False, True):
                try:
                    result, error = self._ask((function, args, kwargs))
                    break
                except (EOFError, OSError):
                    status = self._end()
                    if is_last or self._num_stops != num_stops:
                        raise MachineError(
                            f"The helper process died in {function.__module__}.{function.__name__} (exit status "
                            f"{status}): -9 is what Linux does where memory runs out. Run again: finished stages are "
                            "kept."
                        ) from None
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """End it, whatever it is doing: a call in another thread raises MachineError."""
        self._num_stops += 1
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _ask(self, call: tuple[Callable[P, T], Any, Any]) -> Any:
        self._start()
        assert self._pipe is not None
        assert self._process is not None
        self._pipe.send(call)
        while not self._pipe.poll(_LOOK_SECONDS):
            # Whoever stops it stops the run for ever, which waits for it.
            self._process.send_signal(signal.SIGCONT)
        return self._pipe.recv()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        self._pipe, other = Pipe()
        with other:
            self._process = subprocess.Popen(  # noqa: S603 (our own module)
                [sys.executable, "-m", "quantlib.helper", str(other.fileno())],
                pass_fds=[other.fileno()],
                # It finds the modules that this process finds.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                # Ctrl-C in the terminal is not its business.
                start_new_session=True,
            )

    def _end(self) -> int | None:
        """With the lock held; its exit status."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is None:
            return None
        self._process.kill()
        status, self._process = self._process.wait(), None
        return status


def _serve(pipe: "Connection[Any, Any]") -> None:
    os.nice(10)
    import torch

    from quantlib.process import prepare_process

    prepare_process()
    # The other cores are the other process's.
    torch.set_num_threads(1)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except (EOFError, OSError):  # However the other process ended.
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = function(*args, **kwargs), None
        except Exception as error:
            answer = None, error
        try:
            pipe.send(answer)
        except OSError:
            return  # Nobody waits for it any more.


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
