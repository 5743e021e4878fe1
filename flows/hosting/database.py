"""Prefect's own database: what a new one starts as, and whether an old one can be read.

An empty database costs Prefect 6 seconds of migrations, more than all else that its server does when it starts. So
the first server of an environment keeps what came of them, and the next new home begins with a copy. Prefect checks,
and brings up to date, whatever it finds: the copy saves time and decides nothing.

PREFIX/share/quantflow/prefect-VERSION.db.gz    compressed, which checks it, too
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
    # A database of gigabytes takes minutes to check; that it opens must do there.
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
    """Give this process's Prefect a migrated database where it has none yet; for a server, before it starts.

    Nothing is done where the database is another than the SQLite file of a Prefect home, or is there already.

    Args:
        templates: Folder of migrated databases; None: that of the Python environment. One that cannot be written to
            saves nothing, and is no error.
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
    """Whether `file` is now what the template holds, or what somebody else has put there meanwhile."""
    try:
        content = gzip.decompress(template.read_bytes())
    except (OSError, EOFError, zlib.error):  # None yet, or damaged.
        return False
    if not content:  # What an empty file decompresses to.
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    with temporary.new_folder(file.parent) as place:
        new = place / file.name
        write_atomically(new, content)
        try:
            # A link, where a file that another server has begun would be replaced by a rename.
            os.link(new, file)
        except FileExistsError:
            return True
        except OSError:  # A file system without links.
            return False
    return True


def _content(file: Path) -> bytes:
    """A database as one file: what is in its write-ahead log, too."""
    with temporary.new_folder() as place:
        whole = place / "whole.db"
        with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(whole)) as copy:
            source.backup(copy)
        return whole.read_bytes()
