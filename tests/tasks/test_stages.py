"""Stages without Prefect's engine: `reuse_or_compute` is what a run's Prefect tasks call."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from crashing import Crashing
from prefect.states import State
from torch import nn

from flows.graphs.evaluation import targets_of
from quantlib.data import loading, shards
from quantlib.data.transforms import EvalTransform
from quantlib.errors import MachineError, ModelError, QuantflowError
from quantlib.inputs import find_inputs
from quantlib.measure import predictions
from quantlib.measure.predictions import Predictions
from quantlib.models.source import ModelInput
from quantlib.quantize import stored
from quantlib.recipe.interface import FLOAT
from quantlib.recipe.schema import parse_recipe
from quantlib.recipe.variant import Variant
from quantlib.runtimes import available
from quantlib.runtimes.available import Runtime, torch_runtime
from tasks.data import decode
from tasks.execution import start_run
from tasks.export import draft_onnx, is_refusal, save_onnx, save_program, script_and_save, try_file
from tasks.model import fuse, load_float
from tasks.quantize import calibrate, choose_epoch, has_stalled
from tasks.refs import BenchmarkTarget, CandidateRefs, EpochRefs, FileRefs, VariantRefs
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
    assert reuse_or_compute(run, choose_epoch, models, files, tuple(_answers(run, *top1)), branch="b") == (
        models[best],
        files[best],
        run.store.put_json("choice", best),
    )


def test_training_that_never_beats_its_start_stalls(run):
    assert has_stalled(run, _answers(run, 8, 7, 7), 2)
    assert not has_stalled(run, _answers(run, 8, 7, 9), 2)
    assert not has_stalled(run, _answers(run, 8, 7), 2)


def _qat_variants(run, start, epoch, runtime):
    """What a QAT is whose start was best, and one whose only epoch was; by the answers of files in a runtime."""
    start_answers, epoch_answers = _answers(run, 9, 8)
    metrics = {"epoch": 0, "loss": 1.0, "train_top1": 0.5, "observers_frozen": True, "batch_norm_frozen": True}
    variant = Variant(name="q", method="qat", qconfig="accurate", engine="x86")
    candidate, trained = (
        CandidateRefs(
            model=file,
            reference=FileRefs(file=file, runtime=runtime, validation=answers, selection=answers),
        )
        for file, answers in ((start, start_answers), (epoch, epoch_answers))
    )
    of_epoch = EpochRefs(metrics=run.store.put_json("metrics", metrics), **vars(trained))
    return tuple(
        VariantRefs(
            variant=variant,
            reference=chosen.reference,
            saved=((runtime, chosen.reference.file),),
            start=candidate,
            epochs=(of_epoch,),
            best_epoch=best_epoch,
        )
        for chosen, best_epoch in ((candidate, None), (trained, 0))
    )


def _refusal(run, reason="too dynamic"):
    return run.store.put_json("refusal", {"reason": reason})


def _samples(run, *targets):
    """One millisecond for each target."""
    timings = [{"model": n, "batch_size": 1, "num_threads": 1, "samples_ms": [1.0 + n]} for n in range(len(targets))]
    return read_samples(
        run.store, tuple(BenchmarkTarget(*each) for each in targets), run.store.put_json("timings", timings)
    )


@pytest.mark.parametrize(
    ("kind", "runtime"), [("torchscript", torch_runtime("x86")), ("onnx", Runtime("openvino", "1"))]
)
def test_qat_that_kept_its_start_says_so_and_reports_the_starts_figures(run, kind, runtime):
    start, epoch = run.store.put(kind, b"start"), run.store.put(kind, b"epoch")
    variants = _qat_variants(run, start, epoch, runtime)
    samples = _samples(run, (start, runtime), (epoch, runtime))
    kept, moved = (_measured(run.store, refs, samples, run.home / "models") for refs in variants)
    assert (kept.kept_start, kept.files[0].validation.top1, [e.chosen for e in kept.epochs]) == (True, 0.9, [False])
    assert (moved.kept_start, moved.files[0].validation.top1, [e.chosen for e in moved.epochs]) == (False, 0.8, [True])
    assert [measured.start_validation.top1 for measured in (kept, moved)] == [0.9, 0.9]
    assert [measured.epochs[0].validation.top1 for measured in (kept, moved)] == [0.8, 0.8]


# Files that there are, and those that there are not


OPENVINO, ONNXRUNTIME, TORCH_EXPORT = (Runtime(name, "1") for name in ("openvino", "onnxruntime", "torch_export"))


def _variant_refs(run, script, others, engines=()):
    """A variant that is judged by its first file."""
    (answers,) = _answers(run, 9)
    saved = ((torch_runtime("x86"), script), *others)
    runtime, file = next((runtime, file) for runtime, file in saved if file.kind != "refusal")
    return VariantRefs(
        variant=Variant(name="p", method="ptq", qconfig="accurate", engine="x86"),
        reference=FileRefs(file=file, runtime=runtime, validation=answers, selection=answers),
        saved=saved,
        engines=engines,
    )


def test_a_file_that_serves_several_runtimes_is_one_file_with_one_name(run):
    script, shared = run.store.put("torchscript", b"script"), run.store.put("onnx", b"shared")
    refs = _variant_refs(run, script, ((ONNXRUNTIME, shared), (OPENVINO, shared)))
    assert refs.runtimes == {script: [torch_runtime("x86")], shared: [ONNXRUNTIME, OPENVINO]}
    samples = _samples(run, (script, torch_runtime("x86")), (shared, ONNXRUNTIME), (shared, OPENVINO))
    measured = _measured(run.store, refs, samples, run.home)
    assert measured.torchscript_path == str(run.home / "p.pt")
    assert measured.onnx_paths == (str(run.home / "p.onnx"),)
    assert (measured.torchscript_refusal, measured.onnx_refusal) == (None, None)
    assert measured.samples_ms == {
        ("torchscript-x86", 1, 1): [1.0],
        ("onnxruntime", 1, 1): [2.0],
        ("openvino", 1, 1): [3.0],
    }


def test_a_file_for_each_runtime_has_the_runtime_in_its_name(run):
    script, first, second = run.store.put("torchscript", b"s"), run.store.put("onnx", b"1"), run.store.put("onnx", b"2")
    refs = _variant_refs(run, script, ((ONNXRUNTIME, first), (OPENVINO, second)))
    assert refs.runtimes == {script: [torch_runtime("x86")], first: [ONNXRUNTIME], second: [OPENVINO]}
    samples = _samples(run, (script, torch_runtime("x86")), (first, ONNXRUNTIME), (second, OPENVINO))
    measured = _measured(run.store, refs, samples, run.home)
    assert measured.onnx_paths == (str(run.home / "p.onnxruntime.onnx"), str(run.home / "p.openvino.onnx"))


def test_a_variant_without_a_torchscript_file_is_reported_by_its_onnx_file_and_says_why(run):
    refusal, file = _refusal(run), run.store.put("onnx", b"file")
    refs = _variant_refs(run, refusal, ((ONNXRUNTIME, _refusal(run, "wrong")), (OPENVINO, file)))
    assert refs.runtimes == {file: [OPENVINO]}
    measured = _measured(run.store, refs, _samples(run, (file, OPENVINO)), run.home)
    assert (measured.torchscript_path, measured.torchscript_refusal) == (None, "too dynamic")
    assert (measured.onnx_paths, measured.onnx_refusal) == ((str(run.home / "p.onnx"),), "wrong")
    assert [(each.path, each.runtime) for each in measured.files] == [(str(run.home / "p.onnx"), "openvino")]


def test_a_file_of_torch_export_has_its_own_ending_and_its_own_reason(run):
    script, file, program = run.store.put("torchscript", b"s"), run.store.put("onnx", b"1"), _refusal(run)
    refs = _variant_refs(run, script, ((OPENVINO, file), (TORCH_EXPORT, program)))
    measured = _measured(run.store, refs, _samples(run, (script, torch_runtime("x86")), (file, OPENVINO)), run.home)
    assert (measured.onnx_paths, measured.onnx_refusal) == ((str(run.home / "p.onnx"),), None)
    assert measured.other_refusal == "too dynamic"
    program = run.store.put("torch_export", b"p")
    refs = _variant_refs(run, _refusal(run), ((TORCH_EXPORT, program),))
    measured = _measured(run.store, refs, _samples(run, (program, TORCH_EXPORT)), run.home)
    assert [(each.path, each.runtime) for each in measured.files] == [(str(run.home / "p.pt2"), "torch_export")]
    assert (measured.onnx_paths, measured.other_refusal) == ((), None)


def test_a_reason_that_every_runtime_gives_is_given_once(run):
    script = run.store.put("torchscript", b"script")
    refs = _variant_refs(run, script, ((ONNXRUNTIME, _refusal(run)), (OPENVINO, _refusal(run))))
    measured = _measured(run.store, refs, _samples(run, (script, torch_runtime("x86"))), run.home)
    assert (measured.onnx_paths, measured.onnx_refusal) == ((), "too dynamic")


def test_files_are_timed_in_every_runtime_that_they_run_in_and_none_where_there_is_no_file(run):
    script, file = run.store.put("torchscript", b"script"), run.store.put("onnx", b"file")
    engines = ((torch_runtime("fbgemm"), _refusal(run, "it crashed")), (torch_runtime("onednn"), script))
    for artifact, tried, names in (
        (script, engines, ["torchscript-x86", "torchscript-onednn"]),
        (_refusal(run), (), []),
    ):
        targets = targets_of(_variant_refs(run, artifact, ((ONNXRUNTIME, _refusal(run)), (OPENVINO, file)), tried))
        assert [target.runtime.name for target in targets] == [*names, "openvino"]
        assert [target.artifact for target in targets] == [script] * len(names) + [file]


def test_a_file_that_crashes_on_another_engine_is_left_out_there_and_the_reason_is_kept(run, val_shard):
    shard = run.store.put("shard", val_shard.read_bytes())

    def tried(kind, engine):
        file, own = run.store.put("torchscript", torch.jit.script(kind().eval()).save_to_buffer()), torch_runtime(None)
        return file, reuse_or_compute(run, try_file, file, shard, own, torch_runtime(engine), FLOAT, branch="x")

    file, found = tried(nn.Identity, None)
    assert found == file
    _, refusal = tried(Crashing, None)
    assert is_refusal(refusal)
    assert "TorchScript file crashed with SIGSEGV in torchscript." in run.store.read_json(refusal)["reason"]
    # What is wrong with the machine, such as memory that ran out, says nothing about the file.
    with pytest.raises(MachineError, match="Engine 'tensorrt' is not available"):
        tried(nn.Identity, "tensorrt")


@pytest.mark.parametrize(("seconds", "refused"), [((5.0, 0.4), True), ((5.0, 0.6), False), ((0.4, 0.01), False)])
def test_an_engine_that_is_far_slower_than_the_files_own_is_left_out(run, val_shard, monkeypatch, seconds, refused):
    file, shard = run.store.put("torchscript", b"file"), run.store.put("shard", val_shard.read_bytes())
    x86, onednn = torch_runtime("x86"), torch_runtime("onednn")
    times = dict(zip((onednn.name, x86.name), seconds, strict=True))
    monkeypatch.setattr("quantlib.helper.time_file", lambda path, runtime, *_: times[runtime])
    monkeypatch.setattr("quantlib.helper.run_file", lambda *_: None)
    found = reuse_or_compute(run, try_file, file, shard, x86, onednn, FLOAT, branch="x")
    assert is_refusal(found) == refused
    if refused:
        reason = run.store.read_json(found)["reason"]
        assert reason == "One image takes 12 times as long in torchscript-onednn as in torchscript-x86."


def _stored(run, model, header):
    return run.store.put(header.kind, stored.hand_over(model, header))


def test_a_model_that_torchscript_or_onnx_refuses_has_no_such_file_and_the_reason_is_kept(
    run, monkeypatch, fused_model, tiny_header, val_shard
):
    def refuse(*_):
        raise ModelError("it cannot be written")

    model = _stored(run, fused_model, replace(tiny_header, fused="eval"))
    shard = run.store.put("shard", val_shard.read_bytes())
    with monkeypatch.context() as refusing:
        refusing.setattr("quantlib.export.scripting.script", refuse)
        refusing.setattr("quantlib.export.onnx_draft.draft", refuse)
        script = reuse_or_compute(run, script_and_save, model, torch_runtime(None), shard, FLOAT, branch="x")
        draft = reuse_or_compute(run, draft_onnx, model, "exporter 1")
    # A model without a draft has no ONNX file in any runtime, for the same reason.
    files = [
        reuse_or_compute(run, save_onnx, draft, model, shard, runtime, FLOAT, branch="x")
        for runtime in (OPENVINO, ONNXRUNTIME)
    ]
    with monkeypatch.context() as refusing:
        refusing.setattr("quantlib.export.torch_export.write", refuse)
        files.append(reuse_or_compute(run, save_program, model, shard, TORCH_EXPORT, FLOAT, branch="x"))
    for refusal in (script, draft, *files):
        assert is_refusal(refusal)
        assert run.store.read_json(refusal) == {"reason": "it cannot be written"}
    assert not is_refusal(model)


def test_a_file_that_fails_its_check_is_refused_with_the_reason(run, monkeypatch, fused_model, tiny_header, val_shard):
    def refuse(content, model, runtime, images, interface, expected=None):
        raise ModelError(f"it crashed in {runtime}")

    monkeypatch.setattr("quantlib.export.check.check_file", refuse)
    model = _stored(run, fused_model, replace(tiny_header, fused="eval"))
    shard = run.store.put("shard", val_shard.read_bytes())
    files = {
        "torchscript": reuse_or_compute(run, script_and_save, model, torch_runtime(None), shard, FLOAT, branch="x")
    }
    for runtime in available.find_runtimes():
        draft = reuse_or_compute(run, draft_onnx, model, "exporter 1")
        draft = draft.result() if isinstance(draft, State) else draft
        files[runtime.name] = reuse_or_compute(run, save_onnx, draft, model, shard, runtime, FLOAT, branch="x")
    files["torch_export"] = reuse_or_compute(run, save_program, model, shard, TORCH_EXPORT, FLOAT, branch="x")
    for name, file in files.items():
        assert is_refusal(file)
        assert run.store.read_json(file) == {"reason": f"it crashed in {name}"}


def test_a_retried_flow_run_resumes_the_run_of_each_of_its_recipes(tmp_path):
    """One recipe's name may end with another's."""
    first, second = (RECIPE.model_copy(update={"name": name}) for name in ("wide-tiny", "tiny"))
    flow_run_id = "0000000a-0000-4000-8000-000000000000"
    met = {}
    for _ in range(2):
        for recipe in (first, second):
            with start_run("quantize", recipe, flow_run_id, tmp_path / "home") as run:
                met.setdefault(recipe.name, set()).add(run.run_id)
    assert {name: len(runs) for name, runs in met.items()} == {"wide-tiny": 1, "tiny": 1}
    assert met["tiny"] != met["wide-tiny"]
