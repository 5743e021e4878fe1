"""Leases: one machine at a time works on something, and no dead one keeps the others waiting.

A lease is an object that its holder writes again and again. Whoever waits takes it over once it has not changed for
its time to live, by the waiter's own clock: clocks of machines are never compared. A holder that was paused, or cut
off, may lose its lease and not know it. Two machines then do the same work; which result stands is not decided here.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from quantlib.errors import MachineError
from quantlib.files import seal, unseal
from quantlib.store.objects import Found, Objects

TIME_TO_LIVE_S = 60.0
# A few renewals may fail before the lease is lost.
RENEWALS_PER_LIFE = 6
_MAX_POLL_S = 1.0


@dataclass(frozen=True)
class Lease:
    """The content of a lease."""

    owner: str
    """Random; empty if nobody holds it."""
    run: str
    host: str
    pid: int
    sequence: int
    """Increases with each write, so that no two have the same content."""
    ttl_s: float
    """Time to live: without a change for this long, it may be taken over."""


_LEASE = TypeAdapter(Lease)


class Watch:
    """Tells whether an object has stopped changing, by this process's own clock."""

    def __init__(self) -> None:
        self._content: bytes | None = None
        self._since = 0.0

    def seconds_unchanged(self, content: bytes) -> float:
        """For how long the content is known to be the same; call it with each content that is read."""
        if content != self._content:
            self._content, self._since = content, time.monotonic()
        return time.monotonic() - self._since


class Held:
    """A lease that this process holds, as far as it knows."""

    def __init__(self, objects: Objects, name: str, lease: Lease, version: Any, written: float) -> None:
        self._objects, self._name, self._lease, self._version = objects, name, lease, version
        self._renewed, self._lost = written, False

    def is_held(self) -> bool:
        """Whether nobody can have taken the lease over."""
        return not self._lost and time.monotonic() - self._renewed < self._lease.ttl_s

    def renew(self) -> None:
        """Write the lease again; without an answer, the next call tries again."""
        if self._lost:
            return
        asked = time.monotonic()
        with suppress(MachineError):
            if self._write(replace(self._lease, sequence=self._lease.sequence + 1)):
                self._renewed = asked

    def release(self) -> None:
        """Let others have the lease at once; if that fails, they have it when its time to live is over."""
        with suppress(MachineError):
            if not self._lost:
                self._write(replace(self._lease, owner="", sequence=self._lease.sequence + 1))

    def _write(self, lease: Lease) -> bool:
        version = self._objects.replace(self._name, seal(asdict(lease)), self._version)
        if version is None:
            # Taken over, or else an earlier write was carried out and its answer lost.
            found = self._objects.get(self._name)
            standing = read_lease(found) if found is not None else None
            if found is None or standing is None or standing.owner != self._lease.owner:
                self._lost = True
                return False
            lease = replace(lease, sequence=standing.sequence + 1)
            version = self._objects.replace(self._name, seal(asdict(lease)), found.version)
        if version is not None:
            self._lease, self._version = lease, version
        return version is not None


@contextmanager
def hold(objects: Objects, name: str, run: str) -> Iterator[Held]:
    """Wait for a lease, and hold it during the block.

    Args:
        objects: Where it is.
        name: Name of its object.
        run: Whose work it is, for people who look at it.
    """
    held = _acquire(objects, name, run)
    try:
        with repeating(held.renew, TIME_TO_LIVE_S / RENEWALS_PER_LIFE):
            yield held
    finally:
        held.release()


def wait_until_free(objects: Objects, name: str) -> None:
    """Wait until nobody holds a lease."""
    watch, pause = Watch(), 0.05
    while (found := objects.get(name)) is not None and not _is_free(found, watch):
        time.sleep(pause)
        pause = min(2 * pause, _MAX_POLL_S)


@contextmanager
def repeating(action: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `action` in another thread, again and again during the block; it has ended after the block."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.wait(every_s):
            action()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def read_lease(found: Found) -> Lease | None:
    """What a lease says; None if it is damaged."""
    try:
        return _LEASE.validate_python(unseal(found.content))
    except ValueError:
        return None


def _acquire(objects: Objects, name: str, run: str) -> Held:
    mine = Lease(secrets.token_hex(8), run, socket.gethostname(), os.getpid(), 1, TIME_TO_LIVE_S)
    watch, pause = Watch(), 0.05
    while True:
        found, asked = objects.get(name), time.monotonic()
        if found is None:
            version = objects.create(name, seal(asdict(mine)))
        elif _is_free(found, watch):
            version = objects.replace(name, seal(asdict(mine)), found.version)
        else:
            time.sleep(pause)
            pause = min(2 * pause, _MAX_POLL_S)
            continue
        if version is not None:
            return Held(objects.impatient(), name, mine, version, asked)


def _is_free(found: Found, watch: Watch) -> bool:
    """Whether a lease was released, or has not changed for its time to live."""
    lease = read_lease(found)
    if lease is not None and not lease.owner:
        return True
    ttl_s = lease.ttl_s if lease is not None else TIME_TO_LIVE_S
    return watch.seconds_unchanged(found.content) > ttl_s
