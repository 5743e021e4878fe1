"""Prefect's own database: a copy of a migrated one for a new home, and damage that is named."""

import gzip
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

import prefect
import pytest

from flows.hosting.database import check_database
from quantlib.errors import MachineError

PREPARE = """
import sys, pathlib
from flows.hosting.database import prepare_database
prepare_database(pathlib.Path(sys.argv[1]))
"""


def prepare(home, templates, **environment):
    """Prepare in its own process, as a server does: Prefect reads its settings once."""
    home.mkdir(exist_ok=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", PREPARE, str(templates)]
    subprocess.run(command, env=own | {"PREFECT_HOME": str(home)} | environment, check=True, timeout=120)
    return home / "prefect.db"


def schema(file):
    """The revision, and the names of all objects; migrations do not reproduce the order of constraints."""
    with closing(sqlite3.connect(file)) as database:
        (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
        return revision, sorted(database.execute("SELECT type, name FROM sqlite_master"))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(templates, database) of an environment's first server."""
    folder = tmp_path_factory.mktemp("environment")
    return folder / "templates", prepare(folder / "home", folder / "templates")


def template_of(templates):
    return templates / f"prefect-{prefect.__version__}.db.gz"


def test_a_new_home_gets_a_copy_of_what_prefects_migrations_made(first, tmp_path):
    templates, database = first
    copy = prepare(tmp_path / "home", templates)
    assert copy.read_bytes() == gzip.decompress(template_of(templates).read_bytes())
    assert schema(copy) == schema(database)


def test_prefects_own_migrations_find_nothing_to_do_on_a_copy(first, tmp_path):
    copy = prepare(tmp_path / "home", first[0])
    before = schema(copy)
    upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    environment = os.environ | {"PREFECT_HOME": str(copy.parent)}
    subprocess.run(upgrade, env=environment, check=True, capture_output=True, timeout=120)
    assert schema(copy) == before


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: content[:-9] + b"123456789"],
)
def test_a_damaged_template_is_made_again(damage, first, tmp_path):
    template = template_of(tmp_path / "templates")
    template.parent.mkdir()
    template.write_bytes(damage(template_of(first[0]).read_bytes()))
    database = prepare(tmp_path / "home", template.parent)
    assert schema(database) == schema(first[1])
    assert gzip.decompress(template.read_bytes())[:15] == b"SQLite format 3"


def test_an_environment_that_cannot_be_written_to_costs_only_time(first, tmp_path):
    (tmp_path / "file").touch()
    database = prepare(tmp_path / "home", tmp_path / "file" / "templates")
    assert schema(database) == schema(first[1])


def test_an_existing_database_is_left_alone(first, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "prefect.db").write_bytes(b"mine")
    assert prepare(tmp_path / "home", first[0]).read_bytes() == b"mine"


@pytest.mark.parametrize("url", ["postgresql+asyncpg://user@127.0.0.1:1/name", "sqlite+aiosqlite:////nowhere/own.db"])
def test_a_database_other_than_the_homes_own_is_left_to_prefect(url, first, tmp_path):
    database = prepare(tmp_path / "home", first[0], PREFECT_API_DATABASE_CONNECTION_URL=url)
    assert not database.exists()


def test_a_damaged_database_is_an_error_that_says_what_is_lost(tmp_path):
    file = tmp_path / "prefect.db"
    file.write_bytes(b"not a database" * 100)
    with pytest.raises(MachineError, match=r"prefect.db is damaged .* Move it away.* only the dashboard's history"):
        check_database(file)


def test_a_database_with_one_damaged_page_is_found(tmp_path):
    file = tmp_path / "prefect.db"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.executemany("INSERT INTO runs VALUES (?)", [("x" * 500,)] * 100)
    check_database(file)
    content = bytearray(file.read_bytes())
    content[8192:8292] = b"\xff" * 100
    file.write_bytes(content)
    with pytest.raises(MachineError, match="is damaged"):
        check_database(file)


def test_a_missing_database_is_not_damage(tmp_path):
    check_database(tmp_path / "prefect.db")
