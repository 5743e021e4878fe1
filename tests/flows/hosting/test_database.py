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

CALL = """
import sys, pathlib
from flows.hosting import database
getattr(database, sys.argv[1])(pathlib.Path(sys.argv[2]))
"""


def call(name, templates, **environment):
    """Call a function in its own process, as a server does: Prefect reads its settings once."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", CALL, name, str(templates)]
    subprocess.run(command, env=own | environment, check=True, timeout=120)


def prepare(home, templates, **environment):
    home.mkdir(exist_ok=True)
    call("prepare_database", templates, PREFECT_HOME=str(home), **environment)
    return home / "prefect.db"


def migrate(home):
    """Migrate a home's database with Prefect's own command."""
    upgrade = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(upgrade, env=os.environ | {"PREFECT_HOME": str(home)}, check=True, capture_output=True, timeout=120)
    return home / "prefect.db"


def schema(file):
    """The revision, and the names of all objects; migrations do not reproduce the order of constraints."""
    with closing(sqlite3.connect(file)) as database:
        (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
        return revision, sorted(database.execute("SELECT type, name FROM sqlite_master"))


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """The folder that `make setup` writes."""
    folder = tmp_path_factory.mktemp("environment") / "templates"
    call("write_template", folder)
    return folder


def template_of(templates):
    return templates / f"prefect-{prefect.__version__}.db.gz"


@pytest.mark.slow
def test_a_new_home_begins_with_the_database_that_prefects_migrations_make(templates, tmp_path):
    copy = prepare(tmp_path / "home", templates)
    assert copy.read_bytes() == gzip.decompress(template_of(templates).read_bytes())
    (tmp_path / "own").mkdir()
    before = schema(copy)
    assert before == schema(migrate(tmp_path / "own"))
    migrate(copy.parent)
    assert schema(copy) == before


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: content[:-9] + b"123456789"],
)
def test_a_damaged_template_is_not_copied(damage, templates, tmp_path):
    template = template_of(tmp_path / "templates")
    template.parent.mkdir()
    template.write_bytes(damage(template_of(templates).read_bytes()))
    assert not prepare(tmp_path / "home", template.parent).exists()


def test_a_run_writes_no_template(tmp_path):
    assert not prepare(tmp_path / "home", tmp_path / "none").exists()
    assert not (tmp_path / "none").exists()


def test_an_existing_database_is_left_alone(templates, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "prefect.db").write_bytes(b"mine")
    assert prepare(tmp_path / "home", templates).read_bytes() == b"mine"


@pytest.mark.parametrize("url", ["postgresql+asyncpg://user@127.0.0.1:1/name", "sqlite+aiosqlite:////nowhere/own.db"])
def test_a_database_other_than_the_homes_own_is_left_to_prefect(url, templates, tmp_path):
    database = prepare(tmp_path / "home", templates, PREFECT_API_DATABASE_CONNECTION_URL=url)
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
