"""A store that machines share: the records and artifacts in it are everyone's, and a folder of each home is its cache.

Artifacts are written to the cache and to the shared store, then their record, if there is none. Whoever comes second
adopts the record that stands, so that all machines continue from the same artifacts, also where a stage's result
differs from one time to the next. An artifact is downloaded when it is read, and its bytes are hashed on the way.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from quantlib.errors import MachineError, StoreError
from quantlib.files import seal
from quantlib.store import leases, run_notes
from quantlib.store.artifacts import Record, Ref
from quantlib.store.journal import Journal, RunStatus
from quantlib.store.local import Store, parse_record
from quantlib.store.objects import Objects, check_conditions

_FREEING = "leases/freeing"


class SharedStore(Store):
    """A shared store with a cache of it.

    Args:
        folder: Of the cache.
        objects: What is shared.
    """

    def __init__(self, folder: Path, objects: Objects) -> None:
        super().__init__(folder)
        self._cache = Store(folder)
        self._objects = objects
        self._freeing: leases.Held | None = None

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self._objects.place

    def write(self, kind: str, fill: Callable[[IO[bytes]], Any]) -> Ref:
        """Store what `fill` writes to the file it is given, here and in the shared store.

        Raises:
            MachineError: If the disk is full, or the shared store cannot be used.
        """
        ref = self._cache.write(kind, fill)
        self._upload(ref)
        return ref

    def path(self, ref: Ref) -> Path:
        """The artifact's file in the cache, downloaded if need be, after checking its bytes.

        Raises:
            StoreError: If it is missing or damaged.
        """
        with suppress(StoreError):
            return self._cache.path(ref)
        self._download(ref, self._cache.receive)
        return self._cache.path(ref)

    def holds(self, ref: Ref) -> bool:
        """Whether the artifact is whole in the shared store; reads all of it."""
        try:
            self._download(ref, _is_whole)
        except StoreError:
            return False
        return True

    def has(self, ref: Ref) -> bool:
        """Whether the artifact is in the shared store, as it seems from its size."""
        return self._objects.size(_blob(ref)) == ref.size

    def add_record(self, record: Record) -> Record:
        """Store a stage's record, unless there is one whose artifacts exist; return the one that stands."""
        name, content = _record(record.key), seal(asdict(record))
        if self._objects.create(name, content) is not None:
            return record
        while True:
            found = self._objects.get(name)
            standing = parse_record(record.key, found.content) if found is not None else None
            if standing is not None and self._has_artifacts(standing):
                return standing
            if found is None:
                written = self._objects.create(name, content)
            else:
                written = self._objects.replace(name, content, found.version)
            if written is not None:
                return record

    def find_record(self, key: str) -> Record | None:
        """The record under `key`, or None if it is missing or damaged, or one of its artifacts is missing."""
        record = self.read_record(key)
        return record if record is not None and self._has_artifacts(record) else None

    def read_record(self, key: str) -> Record | None:
        """The record under `key`, or None if it is missing or damaged; its artifacts are not checked."""
        found = self._objects.get(_record(key))
        return parse_record(key, found.content) if found is not None else None

    def records(self) -> Iterator[Record]:
        """Every record that can be read, in no particular order; their artifacts are not checked."""
        for key in self._keys():
            record = self.read_record(key)
            if record is not None:
                yield record

    def other_runs(self) -> list[RunStatus]:
        """Runs that use the store, on any machine, as their notes say."""
        return run_notes.read_statuses(self._objects)

    @contextmanager
    def computing(self, key: str, run: str) -> Iterator[None]:
        """Compute the stage with this key: everyone else who is about to waits, then finds the record.

        If another machine takes over meanwhile, because this one seems dead, both compute, and one record stands.

        Args:
            key: The stage's key.
            run: The run that computes.
        """
        with leases.hold(self._objects, f"leases/{key}", run):
            yield

    @contextmanager
    def in_use(self, journal: Journal | None = None) -> Iterator[None]:
        """Nothing is deleted from the store during the block; any number of processes may be in one.

        Args:
            journal: Of the run that uses it; None in a process that works for such a run.

        Raises:
            MachineError: If the shared store cannot be used.
        """
        with self._cache.in_use():
            if journal is None:
                yield
                return
            check_conditions(self._objects)
            with run_notes.announce(self._objects, journal):
                # Whoever deletes looks for notes when it holds this lease: one of the two sees the other.
                leases.wait_until_free(self._objects, _FREEING)
                yield

    @contextmanager
    def freeing(self) -> Iterator[None]:
        """Keep every process on every machine out of `in_use` during the block.

        Raises:
            MachineError: If a process is in it.
        """
        with self._cache.freeing():
            check_conditions(self._objects)
            with leases.hold(self._objects, _FREEING, "cache free") as self._freeing:
                run_notes.require_none_running(self._objects)
                yield
                run_notes.remove_unneeded(self._objects, set(self._keys()))
                for unfinished in (*self._objects.list("incoming"), *self._objects.list("probes")):
                    self._objects.delete(unfinished.name)

    def remove_record(self, key: str) -> None:
        """Delete a stage's record; its artifacts stay. Only inside `freeing`."""
        self._delete(_record(key))
        self._objects.delete(f"leases/{key}")

    def remove_blobs_except(self, kept: set[str]) -> list[int]:
        """Delete all artifacts except those with these hashes, here and in the shared store. Only inside `freeing`.

        Returns:
            The size in bytes of each artifact that was deleted from the shared store.
        """
        sizes = []
        for name, size in self._objects.list("blobs"):
            if name.rpartition("/")[2] not in kept:
                self._delete(name)
                sizes.append(size)
        self._cache.remove_blobs_except(kept)
        return sizes

    def _delete(self, name: str) -> None:
        assert self._freeing is not None
        if not self._freeing.is_held():
            raise MachineError(
                f"This machine was paused, or cut off from {self.place}: others may use what was still to be deleted. "
                "Run the same command again."
            )
        self._objects.delete(name)

    def _keys(self) -> Iterator[str]:
        return (found.name.rpartition("/")[2] for found in self._objects.list("records"))

    def _has_artifacts(self, record: Record) -> bool:
        return all(map(self.has, record.outputs))

    def _upload(self, ref: Ref) -> None:
        if not self.has(ref):
            self._objects.upload(_blob(ref), self._cache.path(ref))

    def _download(self, ref: Ref, receive: Callable[[Ref, Iterable[bytes]], bool]) -> None:
        """Read an artifact from the shared store; delete it there if it is damaged, so that it is made again.

        Args:
            ref: The artifact.
            receive: Takes its bytes; returns whether they are what `ref` names.

        Raises:
            StoreError: If it is missing or damaged.
        """
        for _ in range(2):  # What was damaged on the way is right the second time.
            try:
                if not self.has(ref):
                    raise FileNotFoundError  # noqa: TRY301 (it may also vanish from here on)
                if receive(ref, self._objects.download(_blob(ref), ref.size)):
                    return
            except FileNotFoundError:
                raise StoreError(
                    f"Artifact {ref.sha256} is missing from the shared store {self.place}. Run the recipe again to "
                    "recompute the stage that made it."
                ) from None
        self._objects.delete(_blob(ref))
        raise StoreError(
            f"Artifact {ref.sha256} was damaged in the shared store {self.place}, and is deleted there. Run the recipe "
            "again to recompute the stage that made it."
        )


def _is_whole(ref: Ref, chunks: Iterable[bytes]) -> bool:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest() == ref.sha256


def _blob(ref: Ref) -> str:
    return f"blobs/{ref.sha256[:2]}/{ref.sha256}"


def _record(key: str) -> str:
    return f"records/{key}"
