"""Prefect's own database: creates a new one quickly, and checks whether an old one can be read.

An empty database costs Prefect 6 seconds of migrations, more than everything else in its server's start. So
`make setup` keeps a migrated one in the Python environment, and a new home starts with a copy of it. Prefect checks
whatever it finds and brings it up to date: the copy saves time and decides nothing.

PREFIX/share/quantflow/prefect-VERSION.db.gz    compressed, which also checks it
"""

import asyncio
import gzip
import importlib.metadata
import os
import sqlite3
import sys
import zlib
from contextlib import closing, suppress
from pathlib import Path

from quantlib import temporary
from quantlib.errors import MachineError, explain_full_disk
from quantlib.files import write_atomically

_FULL_CHECK_BYTES = 64 * 2**20
_TEMPLATES = Path(sys.prefix) / "share" / "quantflow"


def check_database(file: Path) -> None:
    """Check that Prefect's database can be read.

    Raises:
        MachineError: If it is damaged, or the disk is full, which looks the same.
    """
    if not file.exists():
        return
    # A database of gigabytes takes minutes to check; there it is enough that it opens.
    check = "quick_check(1)" if file.stat().st_size < _FULL_CHECK_BYTES else "schema_version"
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            found = str(database.execute(f"PRAGMA {check}").fetchone()[0])
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok" and not found.isdigit():
        raise explain_full_disk(file.parent) or MachineError(
            f"Prefect's database {file} is damaged ({found}). Move it away, with {file.name}-wal and {file.name}-shm "
            "beside it, and start again: only the dashboard's history is lost, no stage, no report."
        )


def prepare_database(templates: Path = _TEMPLATES) -> None:
    """Give this process's Prefect a migrated database if it has none yet; for a server, before it starts.

    Does nothing if the database is not the SQLite file of a Prefect home, or already exists.

    Args:
        templates: Folder of migrated databases. Without one for this version of Prefect, the server migrates its own.
    """
    from prefect.settings import get_current_settings
    from sqlalchemy.engine import make_url

    settings = get_current_settings()
    file = settings.home / "prefect.db"
    configured = settings.server.database.connection_url
    if configured is None or file.exists():
        return
    url = make_url(configured.get_secret_value())
    if url.get_backend_name() != "sqlite" or not url.database or Path(url.database) != file:
        return
    try:
        content = gzip.decompress(_template_in(templates).read_bytes())
    except (OSError, EOFError, zlib.error):  # None, or a damaged one.
        return
    if content:  # An empty file decompresses to nothing.
        _write_new(content, file)


def write_template(templates: Path = _TEMPLATES) -> None:
    """Keep a migrated database for new homes. Prefect must not be imported yet: it reads its settings then."""
    with temporary.new_folder() as home:
        os.environ["PREFECT_HOME"] = str(home)
        from prefect.server.database import provide_database_interface

        asyncio.run(provide_database_interface().create_db())
        templates.mkdir(parents=True, exist_ok=True)
        write_atomically(_template_in(templates), gzip.compress(_content(home / "prefect.db")))


def _template_in(folder: Path) -> Path:
    return folder / f"prefect-{importlib.metadata.version('prefect')}.db.gz"


def _write_new(content: bytes, file: Path) -> None:
    """Write a file, unless another process has put one there meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary.new_folder(file.parent) as place:
        new = place / file.name
        write_atomically(new, content)
        # A link, because a rename would replace a file that another server has started. On a file system without
        # links, the server migrates its own database.
        with suppress(OSError):
            os.link(new, file)


def _content(file: Path) -> bytes:
    """A database as one file, including its write-ahead log."""
    with temporary.new_folder() as place:
        whole = place / "whole.db"
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(whole)) as copy:
            source.backup(copy)
        return whole.read_bytes()


if __name__ == "__main__":
    write_template()
