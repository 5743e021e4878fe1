import json
import multiprocessing
import os
import signal

import pytest

from quantlib.errors import ModelError, RecipeError
from quantlib.journal import Journal, find_unfinished, read_runs
from quantlib.recipe import parse_recipe

RECIPE = parse_recipe(
    {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
)


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
    with journal.record("quantize", RECIPE, "flow-run"):
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


def test_a_run_whose_process_was_killed_is_crashed_and_can_go_on(crashed):
    assert Journal(crashed).status().state == "crashed"
    assert find_unfinished(crashed.parent, None).file.run_id == crashed.name
    with Journal(crashed).record("quantize", RECIPE, None):
        assert Journal(crashed).status().state == "running"
    assert Journal(crashed).status().state == "completed"


def test_a_run_that_goes_on_keeps_the_time_it_began(crashed):
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


def test_the_newest_unfinished_run_is_resumed_by_default_and_a_finished_one_never(crashed):
    finished = Journal(crashed.parent / "20260102-000000-r-2")
    with finished.record("quantize", RECIPE, None):
        pass
    assert find_unfinished(crashed.parent, None).file.run_id == crashed.name
    with pytest.raises(RecipeError, match="only one that crashed or failed"):
        find_unfinished(crashed.parent, finished.run_id)
    with pytest.raises(RecipeError, match=f"Unfinished runs: {crashed.name}"):
        find_unfinished(crashed.parent, "no-such-run")


def test_a_folder_that_holds_no_run_is_passed_over(crashed):
    (crashed.parent / "empty").mkdir()
    (crashed.parent / "broken").mkdir()
    (crashed.parent / "broken" / "run.json").write_text(json.dumps({"run_id": 1}))
    assert [run.file.run_id for run in read_runs(crashed.parent)] == [crashed.name]
