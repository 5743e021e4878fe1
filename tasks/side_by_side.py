"""Branches side by side, where there is a core to spare.

A branch is a thread that mostly waits. Stages that compute take turns in the flow's own thread: each of them uses all
cores, torch's settings belong to the process, and Ctrl-C reaches that thread. What is Python's alone (to convert, to
script) runs beside them in a process of its own: in a thread it would hold up the others.

Torch likes to compute on every core, and then nothing is gained: on two cores that both computed, runs with a helper
took as long as without, or longer. With a core that torch leaves (OMP_NUM_THREADS below the number of cores), the
stages of a run took a seventh less time.
"""

import atexit
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import Context, ContextVar, copy_context
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from quantlib.helper import Helper

P = ParamSpec("P")
T = TypeVar("T")

_STOP_SECONDS = 10.0


class StoppedError(BaseException):
    """Raised where a branch would go on, after another one has failed; for Prefect, its task has crashed."""

    def __init__(self) -> None:
        super().__init__("Another branch has failed.")


class _Host:
    """The flow's thread, which computes for the branches' threads until all of them are done."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Context, Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._branches: list[tuple[threading.Thread, Future[Any]]] = []
        self._lock = threading.Lock()
        self.stopped = False

    def begin(self, branch: Callable[[], T]) -> "Future[T]":
        """Run a branch in a thread of its own."""
        future: Future[T] = Future()
        context = copy_context()

        def run() -> None:
            try:
                future.set_result(context.run(branch))
            except BaseException as error:
                future.set_exception(error)
            self._calls.put(None)  # So that the host looks.

        thread = threading.Thread(target=run, daemon=True)
        with self._lock:
            self._branches.append((thread, future))
        thread.start()
        return future

    def compute(self, call: Callable[[], T]) -> T:
        """In a branch's thread: what `call` gives in the host's.

        Raises:
            StoppedError: If another branch has failed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self.stopped:
                raise StoppedError
            self._calls.put((copy_context(), call, future))
        return future.result()

    def serve(self) -> None:
        """In the host's thread: compute until every branch is done, or one has failed, whose error is raised."""
        try:
            while self._first_error() is None and not all(future.done() for _, future in self._branches):
                waiting = self._calls.get()
                if self._first_error() is not None:
                    self._calls.put(waiting)  # It is told with the others.
                elif waiting is not None:
                    _compute(*waiting)
        except BaseException:
            self._stop()
            raise
        error = self._first_error()
        if error is not None:
            self._stop()
            raise error

    def _first_error(self) -> BaseException | None:
        return next((error for _, future in self._branches if future.done() and (error := future.exception())), None)

    def _stop(self) -> None:
        with self._lock:
            self.stopped = True
        helper().stop()
        while not self._calls.empty():
            waiting = self._calls.get()
            if waiting is not None:
                waiting[2].set_exception(StoppedError())
        # They tell Prefect what became of their tasks.
        for thread, _ in self._branches:
            thread.join(_STOP_SECONDS)


def _compute(context: Context, call: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(context.run(call))
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):
            raise


_HOST: ContextVar[_Host | None] = ContextVar("host", default=None)
_HELPER_IS_FREE = threading.Lock()


def side_by_side(branches: Sequence[Callable[[], T]]) -> list[T]:
    """What each branch gives, in their order; they run side by side where there is a core to spare.

    Raises:
        Exception: Of the branch that fails first; the others are stopped.
    """
    from quantlib.runtimes.engine import has_spare_core  # Imports torch.

    if not has_spare_core():
        return one_by_one(branches)
    helper().start()
    host = _Host()
    token = _HOST.set(host)
    try:
        futures = [host.begin(branch) for branch in branches]
    finally:
        _HOST.reset(token)
    host.serve()
    return [future.result() for future in futures]


def one_by_one(branches: Sequence[Callable[[], T]]) -> list[T]:
    """What each branch gives, in their order, one after the other."""
    return [branch() for branch in branches]


def later(call: Callable[[], T]) -> "Future[T]":
    """What `call` will give: beside the branch that goes on, or now where nothing runs side by side."""
    host = _HOST.get()
    if host is not None:
        return host.begin(call)
    future: Future[T] = Future()
    future.set_result(call())
    return future


def in_turn(call: Callable[[], T]) -> T:
    """What `call` gives in the flow's thread, one after the other."""
    host = _HOST.get()
    return call() if host is None else host.compute(call)


def beside(call: Callable[[], T]) -> T:
    """What `call` gives in the thread that asks, once the helper process is free for it."""
    with _HELPER_IS_FREE:
        return call()


def aside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of quantlib gives in the helper process; in this one where nothing runs side by side.

    Raises:
        StoppedError: If another branch has failed.
    """
    host = _HOST.get()
    if host is None:
        return function(*args, **kwargs)
    if host.stopped:
        raise StoppedError  # Else the call would start another helper.
    try:
        return helper().call(function, *args, **kwargs)
    except Exception:
        if host.stopped:
            raise StoppedError from None
        raise


def is_stopped() -> bool:
    """Whether the branch that asks is to end, as another one has failed."""
    host = _HOST.get()
    return host is not None and host.stopped


@functools.cache
def helper() -> Helper:
    """The process's helper."""
    found = Helper()
    atexit.register(found.stop)
    return found
