"""Objects in a folder on a shared file system, such as NFS.

A small object is a folder, and each version a numbered file in it: its highest number is the object. Making a hard link
fails if its name exists, on every machine, and needs no lock that a killed process could keep. File locks would not do:
on some shared file systems, each machine has its own.
"""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from quantlib.errors import MachineError
from quantlib.files import read_file
from quantlib.store.objects import Found, Listed

_CHUNK_BYTES = 1 << 20
_NUM_TRIES = 20
_UNFINISHED = "incoming"
_PLAIN = ("blobs", _UNFINISHED)


class FolderObjects:
    """Objects below a folder.

    Args:
        folder: Must exist: where the file system is not mounted, it does not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = str(folder)

    def get(self, name: str) -> Found | None:
        """A small object, or None if there is none."""
        with self._explained():
            for _ in range(_NUM_TRIES):
                number = self._newest(name)
                if number is None:
                    return None
                with suppress(FileNotFoundError):  # Replaced or deleted since.
                    return Found(read_file(self.folder / name / _file_of(number)), number)
                time.sleep(0.05)
            raise OSError(errno.ESTALE, f"{name} is listed, but cannot be opened")

    def create(self, name: str, content: bytes) -> int | None:
        """Write a small object where there is none; its version, or None if another stands there."""
        with self._explained():
            return None if self._newest(name) is not None else self._add(name, 1, content)

    def replace(self, name: str, content: bytes, version: int) -> int | None:
        """Write a small object in place of a version; the new version, or None if that is no longer there."""
        with self._explained():
            return None if self._newest(name) != version else self._add(name, version + 1, content)

    def size(self, name: str) -> int | None:
        """Bytes of an artifact, or None if there is none."""
        with self._explained():
            self._refresh(name)
            try:
                return (self.folder / name).stat().st_size
            except FileNotFoundError:
                return None

    def upload(self, name: str, path: Path) -> None:
        """Write an artifact from a file; others see all of it or nothing."""
        place = self.folder / name
        with self._explained(), self._unfinished() as (file, unfinished):
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
            file.flush()
            os.fsync(file.fileno())
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished.replace(place)
            _flush_folder(place.parent)

    def download(self, name: str, size: int) -> Iterator[bytes]:  # noqa: ARG002 (a file ends by itself)
        """Read an artifact in pieces.

        Raises:
            FileNotFoundError: If there is none.
        """
        with self._explained():
            try:
                file = (self.folder / name).open("rb")
            except FileNotFoundError:
                file = None
            if file is not None:
                with file:
                    while chunk := file.read(_CHUNK_BYTES):
                        yield chunk
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "no such artifact", name)

    def list(self, folder: str) -> Iterator[Listed]:
        """All objects below a folder, in no particular order."""
        with self._explained():
            for place, _, files in os.walk(self.folder / folder):
                found = Path(place)
                shown = files if folder in _PLAIN else [_file_of(max(numbers))] if (numbers := _numbers(files)) else []
                for file in shown:
                    with suppress(FileNotFoundError):  # Replaced or deleted since.
                        size = (found / file).stat().st_size
                        yield Listed(self._name(found / file if folder in _PLAIN else found), size)

    def delete(self, name: str) -> None:
        """Delete an object, if there is one."""
        path = self.folder / name
        with self._explained():
            if not path.is_dir():
                path.unlink(missing_ok=True)
                return
            for version in path.iterdir():
                version.unlink(missing_ok=True)
            with suppress(OSError):  # A new object of this name was created meanwhile.
                path.rmdir()

    def impatient(self) -> "FolderObjects":
        """The same: a file system is asked once, and answers when it does."""
        return self

    def _add(self, name: str, number: int, content: bytes) -> int | None:
        """Add a version, unless there is one of this number or a higher one."""
        place = self.folder / name / _file_of(number)
        with self._unfinished() as (file, unfinished):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(unfinished, place)
            except FileExistsError:
                # NFS: if the answer is lost, the link is asked for again, and exists.
                if unfinished.stat().st_nlink == 1:
                    return None
            _flush_folder(place.parent)
        if self._newest(name) != number:
            # Others added and removed this number before, or have replaced what was just written.
            return None
        for old in _numbers(os.listdir(place.parent)):  # noqa: PTH208 (names)
            # The one before stays, for whoever has just listed it.
            if old < number - 1:
                place.with_name(_file_of(old)).unlink(missing_ok=True)
        return number

    def _newest(self, name: str) -> int | None:
        self._refresh(name)
        try:
            return max(_numbers(os.listdir(self.folder / name)), default=None)  # noqa: PTH208 (names)
        except FileNotFoundError:
            return None

    def _refresh(self, name: str) -> None:
        """Ask the server for the folder that holds `name`: NFS answers lookups from a cache of what was not there."""
        with suppress(FileNotFoundError):
            os.close(os.open((self.folder / name).parent, os.O_RDONLY))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    @contextmanager
    def _unfinished(self) -> Iterator[tuple[IO[bytes], Path]]:
        """A new file, removed afterwards unless it was renamed; `cache free` removes what killed processes left."""
        folder = self.folder / _UNFINISHED
        folder.mkdir(exist_ok=True)
        path = folder / secrets.token_hex(8)
        with path.open("xb") as file:
            try:
                yield file, path
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say which place it is about when the file system refuses.

        Raises:
            MachineError: In place of the operating system's error.
        """
        try:
            yield
        except OSError as error:
            kept = "then run `quantflow resume`: finished stages are kept."
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                message = f"The shared store {self.place} is full: free some space there, {kept}"
            else:
                message = (
                    f"The shared store {self.place} cannot be used ({error.strerror}): check that it is mounted and "
                    f"that you may write there, {kept}"
                )
            raise MachineError(message) from None


def _file_of(number: int) -> str:
    return f"{number:012}"


def _numbers(files: Iterable[str]) -> list[int]:
    """The versions in a folder; NFS keeps files of its own there (.nfs…)."""
    return [int(file) for file in files if file.isdigit()]


def _flush_folder(folder: Path) -> None:
    """Let what was linked or renamed in a folder survive a crash of its machine."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
