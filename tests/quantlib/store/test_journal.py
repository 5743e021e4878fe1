import io
import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from flows.cli.console import run_details, runs_table
from quantlib.errors import MachineError, ModelError, RecipeError
from quantlib.recipe.schema import parse_recipe
from quantlib.store.journal import Journal, find_run, find_unfinished, read_runs

RECIPE = parse_recipe(
    {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
)


FLOW_RUN = "7b6f2c1e-0c1d-4c53-9d0a-2f5a3f3c9e11"


def record_and_die(folder):
    with Journal(folder).record("quantize", RECIPE, None):
        Journal(folder).stage_started("fuse-eval", "key")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def crashed(tmp_path):
    """The folder of a run whose process was killed inside a stage."""
    folder = tmp_path / "runs" / "20260101-000000-r-1"
    process = multiprocessing.get_context("spawn").Process(target=record_and_die, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return folder


def test_a_run_is_running_while_its_process_works_and_completed_afterwards(tmp_path):
    journal = Journal(tmp_path / "runs" / "a")
    with journal.record("quantize", RECIPE, FLOW_RUN):
        journal.stage_started("load_float", "k1")
        journal.stage_finished("load_float", "k1", cached=False)
        journal.stage_started("fuse-eval", "k2")
        status = Journal(journal.folder).status()
        assert (status.state, status.num_stages, status.stage) == ("running", 1, "fuse-eval")
    assert journal.status().state == "completed"
    assert journal.status().recipe == RECIPE
    assert journal.status().keys == {"k1", "k2"}


def test_a_run_that_raises_is_failed_with_the_reason(tmp_path):
    journal = Journal(tmp_path / "runs" / "a")
    with pytest.raises(ModelError), journal.record("quantize", RECIPE, None):
        raise ModelError("Weights do not fit.\nMore.")
    assert (journal.status().state, journal.status().message) == ("failed", "Weights do not fit.")


def test_a_run_that_ctrl_c_ended_inside_an_import_is_no_failed_one(tmp_path):
    journal = Journal(tmp_path / "runs" / "a")
    with pytest.raises(KeyboardInterrupt), journal.record("quantize", RECIPE, None):
        raise ImportError("failed to import") from KeyboardInterrupt()
    assert journal.status().state == "crashed"


def test_a_run_whose_process_was_killed_is_crashed_and_can_be_resumed(crashed):
    assert Journal(crashed).status().state == "crashed"
    assert find_unfinished(crashed.parent, None).file.run_id == crashed.name
    with Journal(crashed).record("quantize", RECIPE, None):
        assert Journal(crashed).status().state == "running"
    assert Journal(crashed).status().state == "completed"


def test_a_resumed_run_keeps_its_start_time(crashed):
    began = Journal(crashed).status().file.started_at
    with Journal(crashed).record("quantize", RECIPE, None):
        pass
    assert Journal(crashed).status().file.started_at == began


def test_a_running_run_cannot_be_begun_again(tmp_path):
    folder = tmp_path / "runs" / "a"
    with (
        Journal(folder).record("quantize", RECIPE, None),
        pytest.raises(RecipeError, match="still running"),
        Journal(folder).record("quantize", RECIPE, None),
    ):
        pass


def test_a_line_that_a_crash_cut_short_is_left_out(crashed):
    with (crashed / "stages.jsonl").open("a") as file:
        file.write('{"label": "conv')
    assert [line["label"] for line in Journal(crashed).stages()] == ["fuse-eval"]


def test_a_stage_is_noted_whole_after_a_line_that_was_cut_short(crashed):
    with (crashed / "stages.jsonl").open("a") as file:
        file.write('{"label": "conv')
    Journal(crashed).stage_started("convert-p", "k3")
    assert [line["label"] for line in Journal(crashed).stages()] == ["fuse-eval", "convert-p"]


def test_the_newest_unfinished_run_is_resumed_by_default_and_a_finished_one_where_it_is_named(crashed):
    finished = Journal(crashed.parent / "20260102-000000-r-2")
    with finished.record("quantize", RECIPE, None):
        pass
    assert find_unfinished(crashed.parent, None).file.run_id == crashed.name
    assert find_unfinished(crashed.parent, finished.run_id).state == "completed"
    running = Journal(crashed.parent / "20260103-000000-r-3")
    with running.record("quantize", RECIPE, None), pytest.raises(RecipeError, match="is still running"):
        find_unfinished(crashed.parent, running.run_id)
    with pytest.raises(RecipeError, match=f"Unfinished runs: {crashed.name}"):
        find_unfinished(crashed.parent, "no-such-run")


def test_a_folder_that_holds_no_run_is_passed_over(crashed):
    (crashed.parent / "empty").mkdir()
    assert [run.file.run_id for run in read_runs(crashed.parent)] == [crashed.name]


def _replaced(path, make):
    path.unlink()
    make(path)


DAMAGES = {
    "no text": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
    "no object": lambda path: path.write_text("[1]"),
    "empty": lambda path: path.write_bytes(b""),
    "deep": lambda path: path.write_text('{"recipe": ' * 100_000),
    "of another type": lambda path: path.write_text(json.dumps({"run_id": 1, "state": {}, "started_at": []})),
    "no date": lambda path: path.write_text(re.sub(r'"20\d\d-', '"2x26-', path.read_text())),
    "another value": lambda path: path.write_text(
        path.read_text().replace('"r"', '"s"').replace("failed", "completed")
    ),
    "a surrogate": lambda path: path.write_text('{"run_id": "\\ud800"}'),
    "a folder": lambda path: _replaced(path, Path.mkdir),
    "a named pipe": lambda path: _replaced(path, os.mkfifo),
    "a link to nowhere": lambda path: _replaced(path, lambda place: place.symlink_to("nowhere")),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["run.json", "outcome.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_listed_as_damaged_and_stops_no_other(damage, name, crashed):
    journal = Journal(crashed.parent / "20260102-000000-r-2")
    with pytest.raises(ModelError), journal.record("quantize", RECIPE, FLOW_RUN):
        raise ModelError("r")
    DAMAGES[damage](journal.folder / name)

    states = {run.file.run_id: run.state for run in read_runs(crashed.parent)}
    assert states == {crashed.name: "crashed", journal.run_id: "damaged"}
    assert find_unfinished(crashed.parent, None).file.run_id == crashed.name
    with pytest.raises(RecipeError, match="is damaged .* run its recipe again"):
        find_unfinished(crashed.parent, journal.run_id)
    runs = read_runs(crashed.parent)
    assert all(run_details(run) for run in runs)
    assert len(shown(runs_table(runs))) == len(runs) + 4


@pytest.mark.parametrize("name", ["run.json", "outcome.json", "stages.jsonl"])
def test_no_flipped_bit_stops_a_home_or_goes_unnoticed(name, crashed):
    journal = Journal(crashed.parent / "20260102-000000-r-2")
    with journal.record("quantize", RECIPE, FLOW_RUN):
        journal.stage_started("load_float", "k1")
        journal.stage_finished("load_float", "k1", cached=False)
    file, right = journal.folder / name, journal.status()
    whole = file.read_bytes()
    random = Random(0)
    for _ in range(400):
        place = random.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.randrange(8))]) + whole[place + 1 :])
        found = journal.status()
        if name != "stages.jsonl":
            assert found.state == "damaged" or found == right
        assert find_unfinished(crashed.parent, None).file.run_id == crashed.name


def test_a_stages_entry_that_is_not_a_file_is_read_as_empty_and_not_written_to(crashed):
    _replaced(crashed / "stages.jsonl", os.mkfifo)
    assert Journal(crashed).stages() == []
    with pytest.raises(MachineError, match="named pipe"):
        Journal(crashed).stage_started("fuse-eval", "key")


def test_what_a_file_says_is_no_markup(crashed):
    journal = Journal(crashed.parent / "20260102-000000-[red]r-2")
    with journal.record("quantize", RECIPE, FLOW_RUN):
        journal.stage_started("[/]", "k1")
    lines = shown(runs_table(read_runs(crashed.parent)))
    assert any("20260102-000000-[red]r-2" in line and "[/]" in line for line in lines)


def shown(table):
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_a_long_error_takes_no_line_in_the_list_and_is_shown_on_request(crashed):
    journal = Journal(crashed.parent / "20260102-000000-r-2")
    with pytest.raises(ModelError), journal.record("quantize", RECIPE, FLOW_RUN):
        raise ModelError("The weights do not fit. " * 20)
    runs = read_runs(crashed.parent)
    assert len(shown(runs_table(runs))) == 2 + 4
    assert "The weights do not fit. " * 20 in run_details(find_run(crashed.parent, journal.run_id)) + " "
    with pytest.raises(RecipeError, match=r"No run 'x'. The newest are: 20260102"):
        find_run(crashed.parent, "x")
