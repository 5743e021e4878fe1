"""Several recipes as one flow run, with one table."""

import os
import subprocess
import sys

import httpx
import pytest
from dashboard_driver import TINY, own_environment
from finished_runs import FIRST, report
from rich.console import Console

from flows.cli.many import outcomes_table
from flows.graphs.many import Outcome
from flows.parameters import find_recipes
from quantlib.errors import ModelError, RecipeError
from quantlib.store.journal import Journal, read_runs

NAMES = ("alone", "other", "wrong")


@pytest.fixture
def folder(tmp_path):
    """Two recipes that differ in a branch, and one whose model cannot be built."""
    place = tmp_path / "recipes"
    place.mkdir()
    without_qat = TINY[: TINY.index("[[qat]]")] + "[benchmark]\nnum_samples = 10\n\n[gate]\nmax_top1_drop = 1.0\n"
    broken = ("[model]\narguments", '[model]\narchitecture = "broken:net"\narguments')
    changes = (("minmax", "minmax"), ('"default"', '"fbgemm"'), broken)
    for name, (before, after) in zip(NAMES, changes, strict=True):
        text = without_qat.replace('"tiny"', f'"{name}"').replace(before, after)
        (place / f"{name}.toml").write_text(text)
    return place


def names_of(*given):
    return [recipe.name for recipe in find_recipes(given)]


def test_recipes_are_given_by_name_by_file_or_by_folder(folder):
    assert names_of("digits", str(folder)) == ["digits", *NAMES]
    assert names_of(str(folder / "other.toml")) == ["other"]


def test_a_folder_without_recipes_and_two_recipes_of_one_name_are_errors(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="has no recipe: put files NAME.toml in it"):
        find_recipes((str(tmp_path / "empty"),))
    with pytest.raises(RecipeError, match=r"Two of the recipes are named 'other', the second in .*other.toml"):
        find_recipes((str(folder), str(folder / "other.toml")))


def test_several_recipes_are_one_flow_run_that_computes_shared_stages_once(folder, tmp_path, prefect_server):
    (tmp_path / "broken.py").write_text("def net(**_):\n    raise ValueError('no such depth')\n")
    own = own_environment(OMP_NUM_THREADS="1", COLUMNS="120")
    own |= {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.commands", "run", str(folder), "--home", "home"],
        check=False,
        cwd=tmp_path,
        env=own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "quantflow: wrong: broken:net raised ValueError: no such depth" in done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert lines["alone"].split()[-1] in {"winner", "slower"}
    assert lines["wrong"].split() == ["wrong", "failed"]

    runs = {run.file.recipe["name"]: run for run in read_runs(tmp_path / "home" / "runs")}
    assert {name: run.state for name, run in runs.items()} == {
        "alone": "completed",
        "other": "completed",
        "wrong": "failed",
    }
    assert len({run.file.flow_run_id for run in runs.values()}) == 1
    stages = [line for run in runs.values() for line in Journal(tmp_path / "home" / "runs" / run.file.run_id).stages()]
    computed = [line["key"] for line in stages if line.get("cached") is False]
    assert len(computed) == len(set(computed))
    assert sum(line["label"] == "load_float" for line in stages if line.get("cached") is True) == 1
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"]) as client:
        flow_run = client.get(f"/flow_runs/{runs['wrong'].file.flow_run_id}").json()
    assert flow_run["state"]["type"] == "FAILED"
    assert "wrong: broken:net raised ValueError" in flow_run["state"]["message"]


def test_a_recipe_that_failed_has_a_row_that_says_so(folder):
    (recipe,) = find_recipes((str(folder / "alone.toml"),))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(outcomes_table([Outcome(recipe, report(FIRST), None), Outcome(recipe, None, ModelError("x"))]))
    rows = [line.split() for line in capture.get().splitlines() if line.strip().startswith("alone")]
    assert rows[0][1] == "small"
    assert rows[1] == ["alone", "failed"]
