"""Notes in a shared store about the runs that use it: which records they need, and whether they are still going.

The journal of a run is in its home, which other machines cannot read. While a run goes on, its note is written again
and again, like a lease; the last one says how it ended.
"""

import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter

from quantlib.errors import MachineError
from quantlib.files import seal, unseal
from quantlib.store import leases
from quantlib.store.journal import Date, Journal, RunFile, RunStatus
from quantlib.store.objects import Found, Objects

_FOLDER = "runs"
_POLL_S = 1.0

State = Literal["running", "completed", "failed", "crashed"]


@dataclass(frozen=True)
class RunNote:
    """The content of a note."""

    run_id: str
    host: str
    started_at: Date
    """ISO 8601, UTC."""
    state: State
    keys: tuple[str, ...]
    """Keys of the stages that it reached."""
    sequence: int
    """Increases with each write."""
    ttl_s: float
    """Time to live: without a change for this long, a running run has crashed."""


_NOTE = TypeAdapter(RunNote)


@contextmanager
def announce(objects: Objects, journal: Journal) -> Iterator[None]:
    """Keep a note about a run during the block."""
    _write(objects, journal, "running")
    hurried = objects.impatient()

    def renew() -> None:
        with suppress(MachineError):  # The next one may succeed.
            _write(hurried, journal, "running")

    try:
        with leases.repeating(renew, leases.TIME_TO_LIVE_S / leases.RENEWALS_PER_LIFE):
            yield
    except BaseException:
        with suppress(MachineError):  # The error that ended the run says more.
            _write(hurried, journal, "failed")
        raise
    with suppress(MachineError):  # The run is complete; without the note, its artifacts are kept for longer.
        _write(objects, journal, "completed")


def read_statuses(objects: Objects) -> list[RunStatus]:
    """What the notes say about all runs."""
    return [
        RunStatus(
            file=RunFile(note.run_id, "", {}, note.started_at, note.host, 0, None),
            state=note.state,
            num_stages=len(note.keys),
            stage="",
            keys=frozenset(note.keys),
            message="",
        )
        for _, note in _read(objects).values()
    ]


def require_none_running(objects: Objects) -> None:
    """Check that no run is going on; this takes a run's time to live for each that seems to, as it may have crashed.

    Raises:
        MachineError: If one is.
    """
    first = {name: found for name, (found, note) in _read(objects).items() if note.state == "running"}
    watches = {name: leases.Watch() for name in first}
    while watches:
        for name in list(watches):
            found = objects.get(name)
            note = _parse(found) if found is not None else None
            if found is None or note is None or note.state != "running":
                del watches[name]
            elif found.content != first[name].content:
                raise MachineError(
                    f"Run {note.run_id} is going on on machine {note.host}, and may need what would be deleted from "
                    f"{objects.place}: try again when it has ended."
                )
            elif watches[name].seconds_unchanged(found.content) > note.ttl_s:
                objects.replace(name, _seal(replace(note, state="crashed")), found.version)
                del watches[name]
        if watches:
            time.sleep(min(_POLL_S, leases.TIME_TO_LIVE_S / 10))


def remove_unneeded(objects: Objects, keys: Collection[str]) -> None:
    """Delete the notes about completed runs that use none of the records under `keys`."""
    for name, (_, note) in _read(objects).items():
        if note.state == "completed" and set(keys).isdisjoint(note.keys):
            objects.delete(name)


def _write(objects: Objects, journal: Journal, state: State) -> None:
    name, status = f"{_FOLDER}/{journal.run_id}", journal.status()
    found = objects.get(name)
    before = _parse(found) if found is not None else None
    note = RunNote(
        run_id=journal.run_id,
        host=socket.gethostname(),
        started_at=status.file.started_at if status is not None else datetime.now(UTC).isoformat(),
        state=state,
        keys=tuple(sorted(status.keys)) if status is not None else (),
        sequence=before.sequence + 1 if before is not None else 1,
        ttl_s=leases.TIME_TO_LIVE_S,
    )
    if found is None:
        objects.create(name, _seal(note))
    else:
        objects.replace(name, _seal(note), found.version)


def _read(objects: Objects) -> dict[str, tuple[Found, RunNote]]:
    """All notes by name; those that are damaged are left out, and written again if their run is going on."""
    notes = {}
    for name, _ in objects.list(_FOLDER):
        found = objects.get(name)
        note = _parse(found) if found is not None else None
        if found is not None and note is not None:
            notes[name] = found, note
    return notes


def _parse(found: Found) -> RunNote | None:
    try:
        return _NOTE.validate_python(unseal(found.content))
    except ValueError:
        return None


def _seal(note: RunNote) -> bytes:
    return seal(asdict(note))
