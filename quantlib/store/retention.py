"""What the store holds, for which runs, and what can be deleted from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from quantlib.store.artifacts import Record, Ref
from quantlib.store.journal import RunStatus
from quantlib.store.local import Store


@dataclass(frozen=True)
class Entry:
    """A stage's record, and its use."""

    record: Record
    size: int
    """Bytes of its artifacts; artifacts that other records share are counted in each."""
    runs: tuple[str, ...]
    """Runs that used it, the newest first."""
    last_used: datetime


@dataclass(frozen=True)
class Freed:
    """What was deleted."""

    num_records: int
    num_blobs: int
    size: int
    """Bytes."""


def list_entries(store: Store, runs: Sequence[RunStatus]) -> list[Entry]:
    """Every record of the store, the most recently used first.

    Args:
        store: The store to read.
        runs: All runs of the home, the newest first.
    """
    runs, entries = _with_others(store, runs), []
    for record in store.records():
        users = [run for run in runs if record.key in run.keys]
        times = [datetime.fromisoformat(record.created_at), *(datetime.fromisoformat(r.file.started_at) for r in users)]
        size = sum(ref.size for ref in record.outputs)
        entries.append(Entry(record, size, tuple(run.file.run_id for run in users), max(times)))
    return sorted(entries, key=lambda entry: (entry.last_used, entry.record.key), reverse=True)


def find_damage(store: Store) -> tuple[int, list[tuple[Record, Ref]]]:
    """How many artifacts there should be, and each missing or damaged one with a record that names it."""
    by_artifact = {ref: record for record in store.records() for ref in record.outputs}
    return len(by_artifact), [(record, ref) for ref, record in by_artifact.items() if not store.holds(ref)]


def free(
    store: Store,
    runs: Sequence[RunStatus],
    *,
    unused_for: timedelta | None = None,
    max_size: int | None = None,
    keep_runs: int | None = None,
) -> Freed:
    """Delete records, and the artifacts that no record names any more.

    Args:
        store: The store to delete from.
        runs: All runs of the home, the newest first.
        unused_for: Delete what no run has used for this long.
        max_size: Delete the least recently used until the artifacts take no more bytes than this.
        keep_runs: Delete what is used neither by this many of the newest runs nor by an unfinished one.

    Raises:
        MachineError: If a flow is running, on any machine: it may need what would be deleted.
    """
    with store.freeing():
        runs = _with_others(store, runs)
        entries = list_entries(store, runs)
        kept = [entry for entry in entries if not _is_old(entry, unused_for) and _is_used(entry, runs, keep_runs)]
        kept = _within(kept, max_size)
        keys = {entry.record.key for entry in kept}
        for entry in entries:
            if entry.record.key not in keys:
                store.remove_record(entry.record.key)
        sizes = store.remove_blobs_except({ref.sha256 for entry in kept for ref in entry.record.outputs})
    return Freed(len(entries) - len(kept), len(sizes), sum(sizes))


def _with_others(store: Store, runs: Sequence[RunStatus]) -> list[RunStatus]:
    """The runs of the home, and those of other homes that share the store, the newest first."""
    known = {run.file.run_id for run in runs}
    others = [run for run in store.other_runs() if run.file.run_id not in known]
    return sorted([*runs, *others], key=lambda run: (run.file.started_at, run.file.run_id), reverse=True)


def _is_old(entry: Entry, unused_for: timedelta | None) -> bool:
    return unused_for is not None and datetime.now(UTC) - entry.last_used > unused_for


def _is_used(entry: Entry, runs: Sequence[RunStatus], keep_runs: int | None) -> bool:
    if keep_runs is None:
        return True
    kept = {run.file.run_id for run in runs[:keep_runs]} | {r.file.run_id for r in runs if r.state != "completed"}
    return not kept.isdisjoint(entry.runs)


def _within(entries: Sequence[Entry], max_size: int | None) -> list[Entry]:
    """The most recently used entries whose artifacts together take no more than `max_size`."""
    if max_size is None:
        return list(entries)
    kept: list[Entry] = []
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes |= {ref.sha256: ref.size for ref in entry.record.outputs}
        if sum(sizes.values()) > max_size:
            break
        kept.append(entry)
    return kept
