"""Temporary files and folders, and the removal of those whose process was killed.

Each is locked by its process (flock(2)) for as long as it is used. The kernel releases the lock when the process ends,
wherever it ran: a process id would be reused, and means nothing in another container.

.writing-…             a file that is moved into place when it is complete
quantflow-…/.owner     in a temporary folder: the file that is locked
"""

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

_FILE, _FOLDER, _OWNER = ".writing-", "quantflow-", ".owner"
_OWN = ("models", "prefect", "reports", "runs", "splits", "store")


@contextmanager
def new_file(folder: Path) -> Iterator[IO[bytes]]:
    """A file in `folder`, which is created if missing; deleted after the block, unless it was renamed.

    Its mode is what the umask leaves of rw-rw-rw-.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path = folder / f"{_FILE}{secrets.token_hex(8)}"
        with path.open("x+b") as file:
            if not _lock(file, path):
                continue
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
        return


@contextmanager
def new_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder in `parent`, or else in TMPDIR, for this user alone; deleted after the block with everything in it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=parent))
        with (folder / _OWNER).open("xb") as file:
            if not _lock(file, folder / _OWNER):
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return


def remove_abandoned(home: Path) -> None:
    """Remove what killed processes of this user left below `home`, and in TMPDIR."""
    # Only quantflow's own folders: the home may hold a dataset, too.
    for own in _OWN:
        for place, _, names in os.walk(home / own):
            for path in (Path(place, name) for name in names if name.startswith(_FILE)):
                _remove_unlocked(path, path.unlink)
    for parent in (home / "prefect", Path(tempfile.gettempdir())):
        for owner in parent.glob(f"{_FOLDER}*/{_OWNER}"):
            _remove_unlocked(owner, partial(shutil.rmtree, owner.parent, ignore_errors=True))


def _lock(file: IO[bytes], path: Path) -> bool:
    """Lock `file`; False if it is no longer what `path` names, as it was removed before it was locked."""
    fcntl.flock(file, fcntl.LOCK_EX)
    return _is_at(file.fileno(), path)


def _remove_unlocked(path: Path, remove: Callable[[], None]) -> None:
    with suppress(OSError):  # It is gone, in use, or may not be touched.
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_uid == os.geteuid() and _is_at(file, path):
                remove()
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False
