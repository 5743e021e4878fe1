"""Content-addressed artifacts on disk, and the records that say which stage made which.

    blobs/ab/abcdef…     an artifact, named by the SHA-256 of its bytes, read-only
    records/KEY.json     what the stage with this key made, and out of what

Everything is written to a temporary file, flushed to the disk, then renamed: a reader sees a whole file or none. The
umask decides who may read it.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from quantlib import temporary
from quantlib.errors import MachineError, StoreError, explain_refusal


@dataclass(frozen=True)
class Ref:
    """Names an artifact by its content."""

    kind: str
    """What the bytes are: model, images, evaluation, torchscript, …"""
    sha256: str
    """Of the bytes, in hex."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Record:
    """What one stage made, kept under the stage's key."""

    key: str
    stage: str
    ingredients: dict[str, str]
    """Everything the key was made of, so that a changed key can be explained."""
    outputs: tuple[Ref, ...]
    seconds: float
    """Wall-clock time that the stage took when it was computed."""
    created_at: str
    """ISO 8601, UTC."""


class Store:
    """Artifacts and records below one folder.

    Args:
        folder: Made when it is first written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # (size, mtime, inode) of each blob that was read whole and found right: hashing it again tells nothing new.
        self._verified: dict[str, tuple[int, int, int]] = {}

    def put(self, kind: str, content: bytes) -> Ref:
        """Store bytes; the same bytes are stored once."""
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

    def path(self, ref: Ref) -> Path:
        """The artifact's file, after its bytes were checked.

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
                        "Run the recipe again: the stage that made it is computed anew."
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

    def lay_out(self, ref: Ref, place: Path) -> Path:
        """Give an artifact a file of its own at `place`, which outlives it in the store.

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

    def add_record(self, record: Record) -> None:
        """Keep what a stage made. Its artifacts must be stored before."""
        with _new_file(self.folder / "records") as file:
            file.write(seal(asdict(record)))
            file.flush()
            _publish(file, self._record(record.key), read_only=True)

    def find_record(self, key: str) -> Record | None:
        """The record under `key`, or None where it or one of its artifacts is missing or damaged."""
        record = self.read_record(key)
        if record is None or not all(self.holds(ref) for ref in record.outputs):
            return None
        return record

    def read_record(self, key: str) -> Record | None:
        """The record under `key`, or None where it is missing or damaged; its artifacts are not looked at."""
        try:
            fields = unseal(read_file(self._record(key)))
            outputs = tuple(Ref(**ref) for ref in fields.pop("outputs"))
            record = Record(outputs=outputs, **fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            # Damaged in whatever way: the stage is computed again, and that writes it anew.
            return None
        return record if record.key == key else None

    def records(self) -> Iterator[Record]:
        """Every record that can be read, in no order; their artifacts are not looked at."""
        for path in (self.folder / "records").glob("*.json"):
            record = self.read_record(path.stem)
            if record is not None:
                yield record

    def remove_record(self, key: str) -> None:
        """Forget what a stage made; its artifacts stay. Only inside `freeing`."""
        self._record(key).unlink(missing_ok=True)
        self.lock_file(key).unlink(missing_ok=True)

    def remove_blobs_except(self, kept: set[str]) -> list[int]:
        """Remove every artifact but those with these hashes, and what a crash left unfinished. Only inside `freeing`.

        Returns:
            The size in bytes of each that was removed.
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
        """Nobody else is inside `in_use` inside the block.

        Raises:
            MachineError: If somebody is.
        """
        try:
            with self._lock_uses(fcntl.LOCK_EX | fcntl.LOCK_NB):
                yield
        except BlockingIOError:
            raise MachineError(
                "A flow is running on this home, and may need what would be freed: try again when it has ended."
            ) from None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Nothing is freed from the store inside the block; any number of processes may be inside one."""
        with self._lock_uses(fcntl.LOCK_SH):
            yield

    @contextmanager
    def _lock_uses(self, operation: int) -> Iterator[None]:
        """Hold a flock(2), which the kernel frees when the process ends in whatever way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(lockable(self.folder / "in-use"), flags, 0o666)
        try:
            fcntl.flock(file, operation)
            yield
        finally:
            os.close(file)

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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, and never a part.

    Raises:
        MachineError: If the disk is full, or a folder is in its place.
    """
    with _new_file(path.parent) as file:
        file.write(content)
        file.flush()
        _publish(file, path)


def read_file(path: Path) -> bytes:
    """The content of a file; of nothing else, as a named pipe would have nothing and a device no end.

    Raises:
        OSError: If it cannot be read, or is no file.
    """
    with _open_file(path) as file:
        return file.read()


def seal(fields: Mapping[str, Any]) -> bytes:
    """A JSON object with a hash of itself inside, which shows damage that still parses."""
    return json.dumps({**fields, "sha256": _hash_fields(fields)}, indent=1, sort_keys=True).encode()


def unseal(content: bytes, *, unsealed_too: bool = True) -> dict[str, Any]:
    """What `seal` was given.

    Args:
        content: As it was read.
        unsealed_too: Take an object without a hash as it is, as earlier releases wrote them.

    Raises:
        ValueError: If it is no JSON object, or not what was sealed.
    """
    # Unlike json's, this parser takes neither depth without end nor half a character.
    fields = from_json(content)
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object was written, and this is a {type(fields).__name__}")  # noqa: TRY004
    sha256 = fields.pop("sha256", None)
    if sha256 != _hash_fields(fields) and not (sha256 is None and unsealed_too):
        raise ValueError("it is not what was written")
    return fields


def lockable(path: Path) -> Path:
    """A path that can be opened to be locked: of a file, or of nothing yet.

    Raises:
        MachineError: If something else is there, as a link to another file.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode):
        raise MachineError(f"{path} is {_kind(mode)}, where a file to lock belongs. Remove it, then run again.")
    return path


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Say what to do when the disk that holds `folder` is full.

    Raises:
        MachineError: In place of the error of the operating system.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise explain_refusal(error, folder) or error from None


@contextmanager
def _new_file(folder: Path) -> Iterator[IO[bytes]]:
    """A temporary file in `folder` that is gone afterwards, unless it was published."""
    with naming_full_disk(folder), temporary.new_file(folder) as file:
        yield file


def _publish(file: IO[bytes], place: Path, *, read_only: bool = False) -> None:
    os.fsync(file.fileno())
    place.parent.mkdir(parents=True, exist_ok=True)
    if read_only:
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o444)
    try:
        Path(file.name).replace(place)
    except IsADirectoryError:
        raise MachineError(f"{place} is a folder, where a file belongs. Remove it, then run again.") from None
    # The rename itself must reach the disk, too.
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open_file(path: Path) -> BufferedReader:
    # A named pipe is opened at once, too, where it would wait for a writer.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        raise OSError(errno.EINVAL, f"it is {_kind(mode)}", str(path))
    return os.fdopen(file, "rb")


def _hash_file(path: Path) -> str:
    with _open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_fields(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _unreadable(blob: Path, error: OSError) -> StoreError:
    return StoreError(
        f"Artifact {blob} cannot be read ({error.strerror}). "
        "Run the recipe again: the stage that made it is computed anew."
    )


def _kind(mode: int) -> str:
    """What is not a file, for messages."""
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")
