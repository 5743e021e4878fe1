"""Calls that run at once, in threads, and what they meet in the order in which they would run one after the other."""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")
N = TypeVar("N")

_END_SECONDS = 10.0

_Notes: TypeAlias = list[Any]
"""What a call noted, and the notes of the calls that it began."""
_own: contextvars.ContextVar[_Notes | None] = contextvars.ContextVar("notes", default=None)


class StoppedError(Exception):
    """This call was stopped, because another one failed or the run ends."""

    def __str__(self) -> str:
        return "Stopped, because another stage failed or the run was interrupted."


class Calls(Generic[N]):
    """The calls of a run, and what they note.

    Args:
        at_once: Whether `begin` runs calls in threads; otherwise it makes each one at once, in the caller's thread.
    """

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once
        self._notes: _Notes = []
        self._shared: dict[str, tuple[Future[Any], _Notes]] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._stopped = threading.Event()

    def begin(self, call: Callable[[], T]) -> Callable[[], T]:
        """Begin a call; return what waits for its result, or raises its error."""
        notes: _Notes = []
        self._current().append(notes)
        if not self._at_once:
            result = _with_notes(call, notes)
            return lambda: result
        future: Future[T] = Future()
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(self._run, call, notes, future), daemon=True)
        self._threads.append(thread)
        thread.start()
        return lambda: self._wait(future)

    def once(self, name: str, call: Callable[[], T]) -> T:
        """The result of a call that several callers need: the first of them makes it, the others wait for it."""
        with self._lock:
            is_first = name not in self._shared
            future, notes = self._shared.setdefault(name, (Future(), []))
        self._current().append(notes)
        if not is_first:
            return self._wait(future)
        try:
            result = _with_notes(call, notes)
        except BaseException as error:
            future.set_exception(error)
            raise
        future.set_result(result)
        return result

    def note(self, note: N) -> None:
        """Add to what the current call has noted."""
        self._current().append(note)

    @property
    def notes(self) -> list[N]:
        """What the calls noted so far, each note once, in the order in which the calls were begun."""
        return list({id(note): note for note in _flatten(self._notes)}.values())

    def check(self) -> None:
        """Raise an error if a call has failed: nothing new needs to start.

        Raises:
            StoppedError: If one has.
        """
        if self._stopped.is_set():
            raise StoppedError

    def end(self) -> None:
        """Stop all calls, and wait until they have."""
        self._stopped.set()
        deadline = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            # One that waits for a stage of another run notices only when that is done.
            thread.join(max(0.0, deadline - time.monotonic()))

    def _current(self) -> _Notes:
        own = _own.get()
        return self._notes if own is None else own

    def _run(self, call: Callable[[], T], notes: _Notes, future: "Future[T]") -> None:
        try:
            result = _with_notes(call, notes)
        except BaseException as error:
            if self._failure is None and not isinstance(error, StoppedError):
                self._failure = error
                self._stopped.set()
            future.set_exception(error)
        else:
            future.set_result(result)

    def _wait(self, future: "Future[T]") -> T:
        try:
            return future.result()
        except StoppedError:
            # Why it was stopped is what the user must know.
            raise self._failure or StoppedError from None


def _with_notes(call: Callable[[], T], notes: _Notes) -> T:
    token = _own.set(notes)
    try:
        return call()
    finally:
        _own.reset(token)


def _flatten(notes: _Notes) -> Iterator[Any]:
    for note in notes:
        if isinstance(note, list):
            yield from _flatten(note)
        else:
            yield note
