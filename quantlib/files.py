"""Files that are written whole or not at all, and read whole or refused.

Everything is written to a temporary file, flushed to the disk, then renamed: a reader sees a whole file or none. The
umask decides who may read it.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from quantlib import temporary
from quantlib.errors import MachineError, explain_refusal


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part, even after a crash.

    Raises:
        MachineError: If the disk is full, or a folder is in its place.
    """
    with _new_file(path.parent) as file:
        file.write(content)
        file.flush()
        _publish(file, path)


def read_file(path: Path) -> bytes:
    """The content of a regular file; anything else is refused: a named pipe may hold nothing, and a device has no end.

    Raises:
        OSError: If it cannot be read, or is not a regular file.
    """
    with _open_file(path) as file:
        return file.read()


def seal(fields: Mapping[str, Any]) -> bytes:
    """A JSON object with a hash of itself inside, which reveals damage that still parses."""
    return json.dumps({**fields, "sha256": _hash_fields(fields)}, indent=1, sort_keys=True).encode()


def unseal(content: bytes, *, unsealed_too: bool = True) -> dict[str, Any]:
    """The fields that `seal` was given.

    Args:
        content: The bytes that were read.
        unsealed_too: Accept an object without a hash, as earlier releases wrote it.

    Raises:
        ValueError: If it is not a JSON object, or not what was sealed.
    """
    # Unlike json's, this parser refuses unlimited depth and half characters.
    fields = from_json(content)
    if not isinstance(fields, dict):
        raise ValueError(f"it is a {type(fields).__name__}, not the JSON object that was written")  # noqa: TRY004
    sha256 = fields.pop("sha256", None)
    if sha256 != _hash_fields(fields) and not (sha256 is None and unsealed_too):
        raise ValueError("it is not what was written")
    return fields


def lockable(path: Path) -> Path:
    """A path that can be opened as a lock: of a regular file, or of nothing yet.

    Raises:
        MachineError: If something else is there, such as a link to another file.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(mode):
        raise MachineError(f"{path} is {_kind(mode)}, where a regular file belongs. Remove it, then run again.")
    return path


@contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Say what to do when the disk that holds `folder` is full.

    Raises:
        MachineError: In place of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise explain_refusal(error, folder) or error from None


@contextmanager
def _new_file(folder: Path) -> Iterator[IO[bytes]]:
    """A temporary file in `folder` that is deleted afterwards, unless it was published."""
    with explaining_full_disk(folder), temporary.new_file(folder) as file:
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
    # O_NONBLOCK, as opening a named pipe would otherwise wait for a writer.
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


def _kind(mode: int) -> str:
    """What something that is not a regular file is called in messages."""
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")
