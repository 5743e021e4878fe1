"""Stages without Prefect's engine: `.fn` is what Prefect calls."""

from dataclasses import replace

import numpy as np
import pytest
from prefect.states import State

from quantlib import data, images
from quantlib.errors import ModelError, QuantflowError
from quantlib.inputs import ModelInput, find_inputs
from quantlib.recipe import parse_recipe
from quantlib.transforms import EvalTransform
from tasks.data import decode
from tasks.model import fuse, load_float
from tasks.quantize import calibrate
from tasks.run import current_run, start_run

RECIPE = parse_recipe(
    {"name": "stages", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
)
TINY = '{"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 2]]}'
SOURCE = ModelInput("mobilenet_v2", TINY, "train", "train", "")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in an empty home, outside of any flow."""
    monkeypatch.setenv("QUANTFLOW_HOME", str(tmp_path / "home"))
    with start_run("quantize", RECIPE, None) as run:
        yield run


def test_a_stage_is_computed_once_and_then_returned_as_cached(run):
    computed = load_float.fn(SOURCE, 10, 16, 1, None)
    reused = load_float.fn(SOURCE, 10, 16, 1, None)
    assert isinstance(reused, State)
    assert (reused.name, reused.result()) == ("Cached", computed)
    assert [row.cached for row in run.stages] == [False, True]


def test_a_stage_whose_artifact_is_gone_is_computed_again(run):
    computed = load_float.fn(SOURCE, 10, 16, 1, None)
    run.store.path(computed).unlink()
    assert load_float.fn(SOURCE, 10, 16, 1, None) == computed
    assert run.store.holds(computed)


def test_a_stage_that_fails_leaves_no_record_and_is_tried_again(run, monkeypatch):
    def fail(*_):
        raise ModelError("broken")

    with monkeypatch.context() as broken:
        broken.setattr("quantlib.models.check_logits", fail)
        with pytest.raises(QuantflowError):
            load_float.fn(SOURCE, 10, 16, 1, None)
    assert list(run.store.records()) == []
    assert not isinstance(load_float.fn(SOURCE, 10, 16, 1, None), State)


def test_calibration_in_shards_is_calibration_in_one_piece(run, tmp_path):
    recipe = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"resize": 16, "crop": 16})})
    training = find_inputs(recipe, tmp_path / "splits").training
    fused = fuse.fn(load_float.fn(SOURCE, 10, 16, 1, None), "eval", branch="eval")
    observed = []
    for size in (64, 16):
        before = fused
        for n, part in enumerate(replace(training, stop=training.start + 64).parts(size)):
            shard = decode.fn(part, EvalTransform(16, 16), 1, branch=f"{size}-{n}")
            before = calibrate.fn(before, shard, (), 8, branch=f"{size}-{n}")
        observed.append(before)
    assert observed[0] == observed[1]


def test_a_decoded_shard_holds_the_images_that_were_selected(run, tmp_path):
    selection = replace(find_inputs(RECIPE, tmp_path / "splits").held_back, start=5, stop=25)
    pixels, labels = images.open_shard(run.store.path(decode.fn(selection, EvalTransform(16, 16), 1, branch="x")))
    split, indices = data.select(selection)
    assert pixels.shape == (20, 16, 16, 3)
    assert np.array_equal(labels.numpy(), split.labels[indices])


def test_a_stage_outside_of_a_run_says_where_it_belongs():
    with pytest.raises(RuntimeError, match="Stages run inside a flow"):
        current_run()
