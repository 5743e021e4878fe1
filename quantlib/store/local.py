"""Content-addressed artifacts on disk, and the records that say which stage made which.

    blobs/ab/abcdef…     an artifact, named by the SHA-256 of its bytes, read-only
    records/KEY.json     what the stage with this key made, and from what

Everything is written to a temporary file, flushed to the disk, then renamed: a reader sees a whole file or none. The
umask decides who may read it.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from quantlib.errors import MachineError, StoreError
from quantlib.files import _hash_file, _new_file, _publish, lockable, read_file, seal, unseal, write_atomically
from quantlib.store.artifacts import Record, Ref
from quantlib.store.journal import Journal, RunStatus


class Store:
    """Artifacts and records below one folder.

    Args:
        folder: Created when it is first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # (size, mtime, inode) of each blob that was read whole and found right, so that it need not be hashed again.
        self._verified: dict[str, tuple[int, int, int]] = {}

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return str(self.folder)

    def put(self, kind: str, content: bytes) -> Ref:
        """Store bytes; identical bytes are stored once."""
        return self.write(kind, lambda file: file.write(content))

    def put_json(self, kind: str, value: Any) -> Ref:
        """Store a dataclass, or a list of them, as JSON."""
        return self.put(kind, json.dumps(value, default=asdict, sort_keys=True).encode())

    def read_json(self, ref: Ref) -> Any:
        """What `put_json` stored, as dicts and lists.

        Raises:
            StoreError: If it is missing or damaged.
        """
        return json.loads(self.read(ref))

    def write(self, kind: str, fill: Callable[[IO[bytes]], Any]) -> Ref:
        """Store what `fill` writes to the file it is given.

        Raises:
            MachineError: If the disk is full.
        """
        with _new_file(self.folder / "blobs") as file:
            fill(file)
            file.flush()
            sha256 = _hash_file(Path(file.name))
            ref = Ref(kind, sha256, Path(file.name).stat().st_size)
            if self.holds(ref):
                Path(file.name).unlink()
            else:
                _publish(file, self._blob(sha256), read_only=True)
        return ref

    def receive(self, ref: Ref, chunks: Iterable[bytes]) -> bool:
        """Store an artifact as its bytes arrive; False, and nothing is stored, if they are not what `ref` names.

        Raises:
            MachineError: If the disk is full.
        """
        with _new_file(self.folder / "blobs") as file:
            digest = hashlib.sha256()
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            if digest.hexdigest() != ref.sha256:
                return False
            _publish(file, self._blob(ref.sha256), read_only=True)
        return True

    def path(self, ref: Ref) -> Path:
        """The artifact's file, after checking its bytes.

        Raises:
            StoreError: If it is missing or damaged.
        """
        blob = self._blob(ref.sha256)
        try:
            status = blob.stat()
            seen = (status.st_size, status.st_mtime_ns, status.st_ino)
            if self._verified.get(ref.sha256) != seen:
                if status.st_size != ref.size or _hash_file(blob) != ref.sha256:
                    raise StoreError(
                        f"Artifact {blob} is damaged: its content is no longer what was written. "
                        "Run the recipe again to recompute the stage that made it."
                    )
                self._verified[ref.sha256] = seen
        except OSError as error:
            raise _unreadable(blob, error) from None
        return blob

    def read(self, ref: Ref) -> bytes:
        """The artifact's bytes, checked.

        Raises:
            StoreError: If it is missing or damaged.
        """
        try:
            return read_file(self.path(ref))
        except OSError as error:
            raise _unreadable(self._blob(ref.sha256), error) from None

    def copy_out(self, ref: Ref, place: Path) -> Path:
        """Copy an artifact to a file at `place`, which outlives it in the store.

        Raises:
            StoreError: If it is missing or damaged.
        """
        write_atomically(place, self.read(ref))
        return place

    def holds(self, ref: Ref) -> bool:
        """Whether the artifact is here and whole."""
        try:
            self.path(ref)
        except StoreError:
            return False
        return True

    def has(self, ref: Ref) -> bool:
        """Whether the artifact is there; a store on another machine is not read for that."""
        return self.holds(ref)

    def add_record(self, record: Record) -> Record:
        """Store a stage's record, and return the one that stands. Its artifacts must already be stored."""
        with _new_file(self.folder / "records") as file:
            file.write(seal(asdict(record)))
            file.flush()
            _publish(file, self._record(record.key), read_only=True)
        return record

    def find_record(self, key: str) -> Record | None:
        """The record under `key`, or None if it or one of its artifacts is missing or damaged."""
        record = self.read_record(key)
        if record is None or not all(self.holds(ref) for ref in record.outputs):
            return None
        return record

    def read_record(self, key: str) -> Record | None:
        """The record under `key`, or None if it is missing or damaged; its artifacts are not checked."""
        try:
            return parse_record(key, read_file(self._record(key)))
        except OSError:
            return None

    def records(self) -> Iterator[Record]:
        """Every record that can be read, in no particular order; their artifacts are not checked."""
        for path in (self.folder / "records").glob("*.json"):
            record = self.read_record(path.stem)
            if record is not None:
                yield record

    def remove_record(self, key: str) -> None:
        """Delete a stage's record; its artifacts stay. Only inside `freeing`."""
        self._record(key).unlink(missing_ok=True)
        self.lock_file(key).unlink(missing_ok=True)

    def remove_blobs_except(self, kept: set[str]) -> list[int]:
        """Delete all artifacts except those with these hashes, and what a crash left unfinished. Only inside `freeing`.

        Returns:
            The size in bytes of each deleted file.
        """
        sizes = []
        for path in [*(self.folder / "blobs").rglob("*"), *(self.folder / "records").glob(".writing-*")]:
            status = path.lstat()
            if path.name not in kept and not stat.S_ISDIR(status.st_mode):
                sizes.append(status.st_size if stat.S_ISREG(status.st_mode) else 0)
                path.unlink()
        return sizes

    @contextmanager
    def freeing(self) -> Iterator[None]:
        """Keep every process out of `in_use` during the block.

        Raises:
            MachineError: If a process is in it.
        """
        try:
            with self._lock_uses(fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield
        except BlockingIOError:
            raise MachineError(
                "A flow is running on this home, and may need what would be deleted: try again when it has ended."
            ) from None

    @contextmanager
    def in_use(self, journal: Journal | None = None) -> Iterator[None]:  # noqa: ARG002 (runs of this home are known)
        """Nothing is deleted from the store during the block; any number of processes may be in one.

        Args:
            journal: Of the run that uses it; None in a process that works for such a run.
        """
        with self._lock_uses(fcntl.LOCK_SH):
            yield

    @contextmanager
    def _lock_uses(self, operation: int) -> Iterator[None]:
        """Hold a flock(2), which the kernel releases however the process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(lockable(self.folder / "in-use"), flags, 0o666)
        try:
            fcntl.flock(file, operation)
            yield
        finally:
            os.close(file)

    def other_runs(self) -> list[RunStatus]:
        """Runs that use the store, on any machine; those of this home are in its journal."""
        return []

    @contextmanager
    def computing(self, key: str, run: str) -> Iterator[None]:  # noqa: ARG002 (a lock needs no name)
        """Compute the stage with this key: everyone else who is about to waits, then finds the record.

        Args:
            key: The stage's key.
            run: The run that computes.
        """
        # The kernel releases the lock of a process that died.
        with FileLock(self.lock_file(key)):
            yield

    def lock_file(self, key: str) -> Path:
        """The file to lock while the stage with this key is computed.

        Raises:
            MachineError: If something else is in its place.
        """
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return lockable(folder / key)

    def _blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256[:2] / sha256

    def _record(self, key: str) -> Path:
        return self.folder / "records" / f"{key}.json"


def parse_record(key: str, content: bytes) -> Record | None:
    """The record that was stored under `key`; None if it is damaged: the stage is then computed again."""
    try:
        fields = unseal(content)
        outputs = tuple(Ref(**ref) for ref in fields.pop("outputs"))
        record = Record(outputs=outputs, **fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if record.key == key else None


def _unreadable(blob: Path, error: OSError) -> StoreError:
    return StoreError(
        f"Artifact {blob} cannot be read ({error.strerror}). Run the recipe again to recompute the stage that made it."
    )
