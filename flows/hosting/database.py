"""Prefect's own database: creates a new one quickly, and checks whether an old one can be read.

An empty database costs Prefect 6 seconds of migrations, more than everything else in its server's start. So the first
server of an environment keeps the migrated database, and the next new home starts with a copy. Prefect checks
whatever it finds and brings it up to date: the copy saves time and decides nothing.

PREFIX/share/quantflow/prefect-VERSION.db.gz    compressed, which also checks it
"""

import asyncio
import gzip
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


def prepare_database(templates: Path | None = None) -> None:
    """Give this process's Prefect a migrated database if it has none yet; for a server, before it starts.

    Does nothing if the database is not the SQLite file of a Prefect home, or already exists.

    Args:
        templates: Folder of migrated databases; None: the one in the Python environment. If it cannot be written to,
            no time is saved, but that is not an error.
    """
    import prefect
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
    folder = templates or Path(sys.prefix) / "share" / "quantflow"
    template = folder / f"prefect-{prefect.__version__}.db.gz"
    if not _copy(template, file):
        from prefect.server.database import provide_database_interface

        asyncio.run(provide_database_interface().create_db())
        with suppress(OSError, MachineError):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(template, gzip.compress(_content(file)))


def _copy(template: Path, file: Path) -> bool:
    """Copy the template to `file`; whether `file` now exists, by this copy or by another process's."""
    try:
        content = gzip.decompress(template.read_bytes())
    except (OSError, EOFError, zlib.error):  # It does not exist yet, or is damaged.
        return False
    if not content:  # What an empty file decompresses to.
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary.new_folder(file.parent) as place:
        new = place / file.name
        write_atomically(new, content)
        try:
            # A link, because a rename would replace a file that another server has started.
            os.link(new, file)
        except FileExistsError:
            return True
        except OSError:  # A file system without links.
            return False
    return True


def _content(file: Path) -> bytes:
    """A database as one file, including its write-ahead log."""
    with temporary.new_folder() as place:
        whole = place / "whole.db"
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(whole)) as copy:
            source.backup(copy)
        return whole.read_bytes()
