"""`quantflow cache` and `quantflow plan` on a store that machines share."""

import harness
import pytest
from click.testing import CliRunner

from flows.cli import commands, outcome
from flows.graphs.planning import plan_run
from quantlib.recipe.schema import parse_recipe
from quantlib.store.journal import Journal, read_runs
from quantlib.store.local import Store
from quantlib.store.opening import open_store


@pytest.fixture
def shared(home_copy, tmp_path, monkeypatch):
    """A shared store with all that a run on another machine made, and that machine's note about the run."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("QUANTFLOW_STORE", str(tmp_path / "shared"))
    own, store = Store(home_copy / "store"), open_store(tmp_path / "another machine")
    for record in own.records():
        for ref in record.outputs:
            assert store.put(ref.kind, own.read(ref)) == ref
        store.add_record(record)
    with store.in_use(Journal(home_copy / "runs" / harness.run_id_of(home_copy))):
        pass
    return tmp_path / "shared"


@pytest.fixture
def quantflow(tmp_path, monkeypatch):
    """Runs a command line on an empty home; returns (exit status, output)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        result = CliRunner().invoke(commands.main, [*arguments, "--home", str(tmp_path / "empty home")])
        return result.exit_code, result.output

    return call


def test_an_empty_home_would_reuse_what_another_machine_computed(shared, tmp_path, equally_fast):
    planned = plan_run(parse_recipe(harness.RECIPE), tmp_path / "empty home")
    assert len(planned) > 10
    assert [stage for stage in planned if not stage.reused] == []
    assert read_runs(tmp_path / "empty home" / "runs") == []


def test_the_list_names_the_runs_of_other_machines(shared, home_copy, quantflow):
    status, said = quantflow("cache", "list")
    assert status == 0
    assert "qat_epoch" in said
    assert harness.run_id_of(home_copy) in said


def test_verification_says_which_store_it_read_and_what_is_damaged_there(shared, quantflow):
    status, said = quantflow("cache", "verify")
    assert status == 0
    assert f"{shared}: " in said
    assert "artifacts were read, and 0 are damaged." in said
    next(path for path in (shared / "blobs").rglob("*") if path.is_file()).write_bytes(b"damage")
    status, said = quantflow("cache", "verify")
    assert status == outcome.FAILURE
    assert "and 1 are damaged." in said


def test_freeing_keeps_what_the_newest_run_uses_on_whichever_machine_it_ran(shared, quantflow):
    num_records = len(list((shared / "records").iterdir()))
    status, said = quantflow("cache", "free", "--keep-runs", "1")
    assert (status, said) == (0, f"Freed 0.0 MB in {shared}: 0 stages, 0 artifacts.\n")
    status, said = quantflow("cache", "free", "--keep-runs", "0")
    assert status == 0
    assert f"in {shared}: {num_records} stages" in said
    assert [path for path in shared.rglob("*") if path.is_file() and "leases" not in path.parts] == []


def test_a_store_that_cannot_be_used_is_one_message(quantflow, monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTFLOW_STORE", str(tmp_path / "not mounted"))
    for command in (["cache", "list"], ["plan"], ["run"], ["dashboard", "--port", "0"]):
        status, said = quantflow(*command)
        assert status == outcome.WRONG_INPUT, command
        assert "there is no such folder: mount or create it, then run again." in said
