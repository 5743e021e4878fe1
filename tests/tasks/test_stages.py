"""Stages without Prefect's engine: `reuse_or_compute` is what a run's Prefect tasks call."""

from dataclasses import replace

import numpy as np
import pytest
from prefect.states import State

from quantlib.data import loading, shards
from quantlib.data.transforms import EvalTransform
from quantlib.errors import ModelError, QuantflowError
from quantlib.inputs import find_inputs
from quantlib.measure import predictions
from quantlib.measure.predictions import Predictions
from quantlib.models.source import ModelInput
from quantlib.recipe.schema import parse_recipe
from quantlib.recipe.variant import Variant
from quantlib.runtimes.available import torch_runtime
from tasks.data import decode
from tasks.execution import start_run
from tasks.model import fuse, load_float
from tasks.quantize import calibrate, choose_epoch, has_stalled
from tasks.refs import BenchmarkTarget, CandidateRefs, EpochRefs, VariantRefs
from tasks.report import _measured, read_samples
from tasks.stage import stage

RECIPE = parse_recipe(
    {"name": "stages", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
)
TINY = '{"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 2]]}'
SOURCE = ModelInput("mobilenet_v2", TINY, "train", "train", "")


@pytest.fixture
def run(tmp_path):
    """A run in an empty home, outside any flow."""
    with start_run("quantize", RECIPE, None, tmp_path / "home") as run:
        yield run


def reuse_or_compute(run, stage, *arguments, **named):
    return run.reuse_or_compute(stage, stage.bind(*arguments, **named))


def test_a_stage_is_computed_once_and_then_returned_as_cached(run):
    computed = reuse_or_compute(run, load_float, SOURCE, 10, (3, 16, 16), 1, None)
    reused = reuse_or_compute(run, load_float, SOURCE, 10, (3, 16, 16), 1, None)
    assert isinstance(reused, State)
    assert (reused.name, reused.result()) == ("Cached", computed)
    assert [row.cached for row in run.stages] == [False, True]


def test_a_stage_whose_artifact_is_gone_is_computed_again(run):
    computed = reuse_or_compute(run, load_float, SOURCE, 10, (3, 16, 16), 1, None)
    run.store.path(computed).unlink()
    assert reuse_or_compute(run, load_float, SOURCE, 10, (3, 16, 16), 1, None) == computed
    assert run.store.holds(computed)


def test_a_stage_that_fails_leaves_no_record_and_is_tried_again(run, monkeypatch):
    def fail(*_):
        raise ModelError("broken")

    with monkeypatch.context() as broken:
        broken.setattr("quantlib.models.registry.check_logits", fail)
        with pytest.raises(QuantflowError):
            reuse_or_compute(run, load_float, SOURCE, 10, (3, 16, 16), 1, None)
    assert list(run.store.records()) == []
    assert not isinstance(reuse_or_compute(run, load_float, SOURCE, 10, (3, 16, 16), 1, None), State)


def _work(job, model):
    return model


def test_code_is_parsed_again_where_another_threads_parser_came_between(monkeypatch):
    asked = []

    def hash_tree(tree):
        asked.append(tree)
        if len(asked) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=72, after=102)")
        return "0" * 64

    monkeypatch.setattr("quantlib.store.codehash.hash_tree", hash_tree)
    assert stage("work")(_work)._code() == {"code._work": "0" * 64}
    assert len(asked) == 2


def test_calibration_in_shards_is_calibration_in_one_piece(run, tmp_path):
    recipe = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"resize": 16, "crop": 16})})
    training = find_inputs(recipe, tmp_path / "splits").training
    fused = reuse_or_compute(
        run, fuse, reuse_or_compute(run, load_float, SOURCE, 10, (3, 16, 16), 1, None), "eval", branch="eval"
    )
    observed = []
    for size in (64, 16):
        before = fused
        for n, part in enumerate(replace(training, stop=training.start + 64).parts(size)):
            shard = reuse_or_compute(
                run, decode, part, EvalTransform(resize=16, crop=(16, 16)), 1, branch=f"{size}-{n}"
            )
            before = reuse_or_compute(run, calibrate, before, shard, (), 8, branch=f"{size}-{n}")
        observed.append(before)
    assert observed[0] == observed[1]


def test_a_decoded_shard_holds_the_images_that_were_selected(run, tmp_path):
    selection = replace(find_inputs(RECIPE, tmp_path / "splits").held_out, start=5, stop=25)
    shard = shards.open_shard(
        run.store.path(reuse_or_compute(run, decode, selection, EvalTransform(resize=16, crop=(16, 16)), 1, branch="x"))
    )
    split, indices = loading.select(selection)
    assert shard.pixels.shape == (20, 16, 16, 3)
    assert np.array_equal(shard.labels.numpy(), split.labels[indices])


def _answers(run, *num_correct):
    """References to predictions for ten images, one list per number of right ones."""
    return [
        (run.store.put("predictions", predictions.save(Predictions(np.zeros(10, int), wrong, np.zeros(10, "f4")))),)
        for wrong in (np.arange(10)[:, None] >= count for count in num_correct)
    ]


@pytest.mark.parametrize(("top1", "best"), [((8, 7, 8), 0), ((8, 9, 9), 1), ((1, 2, 3), 2)])
def test_an_epoch_is_chosen_only_where_it_is_better_than_all_before_it(run, top1, best):
    models = tuple(run.store.put("int8-model", bytes([n])) for n in range(3))
    files = tuple(run.store.put("torchscript", bytes([n, n])) for n in range(3))
    states = tuple(run.store.put("trainable-model", bytes([n, n, n])) for n in range(3))
    assert reuse_or_compute(run, choose_epoch, models, files, states, tuple(_answers(run, *top1)), branch="b") == (
        models[best],
        files[best],
        states[best],
        run.store.put_json("choice", best),
    )


def test_training_that_never_beats_its_start_stalls(run):
    assert has_stalled(run, _answers(run, 8, 7, 7), 2)
    assert not has_stalled(run, _answers(run, 8, 7, 9), 2)
    assert not has_stalled(run, _answers(run, 8, 7), 2)


def test_qat_that_kept_its_start_says_so_and_reports_the_starts_figures(run):
    start_answers, epoch_answers = _answers(run, 9, 8)
    start, epoch = run.store.put("torchscript", b"start"), run.store.put("torchscript", b"epoch")
    metrics = {"epoch": 0, "loss": 1.0, "train_top1": 0.5, "observers_frozen": True, "batch_norm_frozen": True}
    variant = Variant(name="q", method="qat", qconfig="accurate", engine="x86")
    candidate = CandidateRefs(model=start, artifact=start, validation=start_answers, selection=start_answers)
    trained = EpochRefs(
        model=epoch,
        artifact=epoch,
        validation=epoch_answers,
        selection=epoch_answers,
        metrics=run.store.put_json("metrics", metrics),
    )
    variants = tuple(
        VariantRefs(
            variant=variant,
            artifact=chosen.artifact,
            validation=chosen.validation,
            selection=chosen.selection,
            start=candidate,
            epochs=(trained,),
            best_epoch=best_epoch,
        )
        for chosen, best_epoch in ((candidate, None), (trained, 0))
    )
    targets = tuple(BenchmarkTarget(artifact, torch_runtime("x86")) for artifact in (start, epoch))
    timings = run.store.put_json(
        "timings", [{"model": n, "batch_size": 1, "num_threads": 1, "samples_ms": [1.0]} for n in (0, 1)]
    )
    samples = read_samples(run.store, targets, timings)
    kept, moved = (_measured(run.store, refs, samples, run.home / "models") for refs in variants)
    assert (kept.kept_start, kept.files[0].validation.top1, [e.chosen for e in kept.epochs]) == (True, 0.9, [False])
    assert (moved.kept_start, moved.files[0].validation.top1, [e.chosen for e in moved.epochs]) == (False, 0.8, [True])
