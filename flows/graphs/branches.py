"""How a variant is made: which stage feeds which. Called by the flows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

from flows.graphs.shared_stages import SharedStages, shard_size, train_transform
from quantlib.errors import ModelError
from quantlib.recipe.branches import BranchRecipe, PTQRecipe, QATRecipe
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.scheme import Scheme
from quantlib.recipe.variant import Variant
from quantlib.report.choice import fastest_runtime
from quantlib.runtimes import available
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.export import is_refusal, save_onnx, script_and_save
from tasks.measure import evaluate, evaluate_baseline, measure_layers, simulate
from tasks.model import plan_layers
from tasks.planning import Pending
from tasks.quantize import (
    calibrate,
    choose_epoch,
    choose_ranges,
    convert,
    correct_bias,
    has_stalled,
    qat_epoch,
    start_qat,
)
from tasks.refs import BenchmarkTarget, CandidateRefs, EpochRefs, FileRefs, VariantRefs
from tasks.report import read_samples
from tasks.run import NotYetKnownError

# Each layer costs two passes over these images. A stage takes only some of them, to finish within minutes.
_LAYER_IMAGES = 256
_LAYER_IMAGES_PER_STAGE = 64


def float_branch(shared: SharedStages) -> VariantRefs:
    """The baseline: fused, exported, evaluated."""
    model = shared.fused_eval
    onnx = _save_onnx(shared, model, "float")
    artifact = shared.run(script_and_save, model, None, shared.validation[0], shared.interface, branch="float")
    file, runtime = _reference(shared, artifact, onnx, None)
    batch_size = shared.recipe.evaluation.batch_size
    validation, selection = _on_shards(
        shared,
        "float",
        lambda shard, name: shared.run(
            evaluate_baseline, file, shard, batch_size, runtime, shared.interface, branch=name
        ),
    )
    return VariantRefs(
        variant=Variant(name="float", method="float"),
        artifact=artifact,
        onnx=onnx,
        reference=FileRefs(file=file, runtime=runtime, validation=validation, selection=selection),
    )


def _fused(shared: SharedStages, branch: BranchRecipe, mode: Literal["eval", "qat"]) -> Ref:
    return shared.fused(mode, equalized=branch.equalizes, smoothing=branch.smoothing)


def _calibrate(shared: SharedStages, branch: BranchRecipe) -> Ref:
    """The calibrated model; its weights and biases are still float's."""
    scheme, observed = _scheme(shared, branch), _fused(shared, branch, "eval")
    for shard, label in _labelled(shared.calibration, branch.name):
        batch_size = shared.recipe.calibration.batch_size
        observed = shared.run(calibrate, observed, shard, scheme.float_layers, batch_size, branch=label)
    return shared.run(choose_ranges, observed, scheme, branch=branch.name)


def _correct(shared: SharedStages, branch: BranchRecipe, calibrated: Ref) -> Ref:
    """The calibrated model, bias-corrected where the branch asks for it."""
    return (
        shared.run(correct_bias, calibrated, shared.calibration, branch=branch.name)
        if branch.corrects_bias
        else calibrated
    )


def _scheme(shared: SharedStages, branch: BranchRecipe) -> Scheme:
    return branch.scheme(available.activation_bits(shared.engine))


def ptq_branch(shared: SharedStages, branch: PTQRecipe) -> VariantRefs:
    """A PTQ variant: calibrated, corrected, converted, exported, evaluated."""
    calibrated = _calibrate(shared, branch)
    candidate = _candidate(shared, _correct(shared, branch, calibrated), branch.name)
    return VariantRefs(
        variant=_variant(shared, branch, "ptq", bias_corrected=branch.corrects_bias),
        artifact=candidate.artifact,
        reference=candidate.reference,
        model=candidate.model,
        plan=_plan(shared, branch),
        onnx=_save_onnx(shared, candidate.model, branch.name),
        simulated=_simulate(
            shared, candidate.model, branch.name, uncorrected=calibrated if branch.corrects_bias else None
        ),
        layers=_layers(shared, candidate.model, branch),
    )


def qat_branch(shared: SharedStages, branch: QATRecipe) -> VariantRefs:
    """A QAT variant: each epoch trained, converted, scripted, evaluated; the best is kept, or else the start."""
    schedule = _schedule(branch, shared.recipe.seed)
    images, scheme = shared.inputs.training, _scheme(shared, branch)
    transform = replace(train_transform(shared.recipe, shared.inputs), scale=branch.train_scale)
    teacher = shared.fused_eval if branch.distill else None
    state = _fused(shared, branch, "qat")
    candidates: list[CandidateRefs] = []
    if branch.start == "calibrated":
        calibrated = _correct(shared, branch, _calibrate(shared, branch))
        state = shared.run(start_qat, state, calibrated, branch=branch.name)
        candidates = [_candidate(shared, state, f"{branch.name}-start")]
    metrics: list[Ref] = []
    for epoch in range(branch.epochs):
        state, found = shared.run(
            qat_epoch, state, epoch, scheme, schedule, images, transform, teacher, branch=branch.name
        )
        metrics.append(found)
        candidates.append(_candidate(shared, state, f"{branch.name}-{epoch}"))
        if branch.patience is not None and _has_stalled(shared, candidates, branch.patience):
            break
    best_model, best_artifact, best_reference, choice = shared.run(
        choose_epoch,
        tuple(candidate.model for candidate in candidates),
        tuple(candidate.artifact for candidate in candidates),
        tuple(candidate.reference.file for candidate in candidates),
        tuple(candidate.reference.selection for candidate in candidates),
        branch=branch.name,
    )
    start = candidates[0] if branch.start == "calibrated" else None
    epochs = candidates[1:] if start else candidates
    try:
        place = shared.run.known(choice).read_json(choice)
    except NotYetKnownError:
        best, best_epoch = None, None
    else:
        best = candidates[place]
        best_epoch = None if best is start else place - bool(start)
    return VariantRefs(
        variant=_variant(shared, branch, "qat", bias_corrected=branch.start == "calibrated" and branch.corrects_bias),
        artifact=best_artifact,
        model=best_model,
        plan=_plan(shared, branch),
        reference=best.reference
        if best
        else FileRefs(file=best_reference, runtime=candidates[0].reference.runtime, validation=(), selection=()),
        best_epoch=best_epoch,
        start=start,
        onnx=_save_onnx(shared, best_model, branch.name),
        simulated=_simulate(shared, best_model, branch.name),
        layers=_layers(shared, best_model, branch),
        epochs=tuple(
            EpochRefs(metrics=found, **vars(candidate)) for found, candidate in zip(metrics, epochs, strict=True)
        ),
    )


def _plan(shared: SharedStages, branch: BranchRecipe) -> Ref:
    return shared.run(plan_layers, shared.fused_eval, branch.float_layers, branch=branch.name)


def _schedule(branch: QATRecipe, seed: int) -> Schedule:
    return Schedule(
        batches_per_epoch=branch.batches_per_epoch,
        batch_size=branch.batch_size,
        epochs=None if branch.learning_rate_decay == "constant" else branch.epochs,
        learning_rate=branch.learning_rate,
        decay=branch.learning_rate_decay,
        freeze_batch_norm_after_epoch=branch.freeze_batch_norm_after_epoch,
        freeze_observer_after_epoch=branch.freeze_observer_after_epoch,
        seed=seed,
    )


def _variant(
    shared: SharedStages, branch: BranchRecipe, method: Literal["ptq", "qat"], *, bias_corrected: bool
) -> Variant:
    return Variant(
        name=branch.name,
        method=method,
        qconfig=branch.qconfig,
        engine=shared.engine,
        scheme=_scheme(shared, branch),
        equalized=branch.equalizes,
        smoothing=branch.smoothing,
        bias_corrected=bias_corrected,
    )


def _candidate(shared: SharedStages, prepared: Ref, name: str) -> CandidateRefs:
    """The file that a calibrated model or a QAT state would ship, evaluated."""
    model = shared.run(convert, prepared, branch=name)
    artifact = shared.run(script_and_save, model, shared.engine, shared.validation[0], shared.interface, branch=name)
    onnx = _save_onnx(shared, model, name, shared.onnx_runtimes[:1]) if is_refusal(artifact) else ()
    file, runtime = _reference(shared, artifact, onnx, shared.engine)
    validation, selection = _evaluate(shared, file, runtime, name)
    reference = FileRefs(file=file, runtime=runtime, validation=validation, selection=selection)
    return CandidateRefs(model=model, artifact=artifact, reference=reference)


def _reference(
    shared: SharedStages, artifact: Ref, onnx: tuple[tuple[Runtime, Ref], ...], engine: str | None
) -> tuple[Ref, Runtime]:
    """The file that a model is judged by, and the runtime: TorchScript, or else the first ONNX file.

    Raises:
        ModelError: If there is neither.
    """
    if not is_refusal(artifact):
        return artifact, available.torch_runtime(engine)
    for runtime, file in onnx:
        if not is_refusal(file):
            return file, runtime
    store = shared.run.known((artifact, onnx))
    reasons = [store.read_json(refusal)["reason"] for refusal in (artifact, *(file for _, file in onnx))]
    raise ModelError(f"No runtime can run the model. {' '.join(dict.fromkeys(reasons))}")


def _has_stalled(shared: SharedStages, candidates: list[CandidateRefs], patience: int) -> bool:
    """Whether to stop training early; a plan that cannot know goes through every epoch."""
    try:
        return len(candidates) > patience and has_stalled(
            shared.run, [candidate.reference.selection for candidate in candidates], patience
        )
    except NotYetKnownError:
        return False


def _evaluate(
    shared: SharedStages, artifact: Ref, runtime: Runtime, name: str
) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
    batch_size = shared.recipe.evaluation.batch_size
    return _on_shards(
        shared,
        name,
        lambda shard, label: shared.run(evaluate, artifact, shard, batch_size, runtime, shared.interface, branch=label),
    )


def _save_onnx(
    shared: SharedStages, model: Ref, name: str, runtimes: tuple[Runtime, ...] | None = None
) -> tuple[tuple[Runtime, Ref], ...]:
    """The ONNX file of a variant for each installed runtime, or for some, or why there is none."""
    return tuple(
        (
            runtime,
            shared.run(
                save_onnx,
                shared.onnx_draft,
                model,
                shared.validation[0],
                runtime,
                shared.interface,
                branch=f"{name}-{runtime.name}",
            ),
        )
        for runtime in (shared.onnx_runtimes if runtimes is None else runtimes)
    )


def targets_of(refs: VariantRefs) -> list[BenchmarkTarget]:
    """A variant's files in every runtime that this machine has for them; its own engine first."""
    engines = (None,) if refs.variant.engine is None else dict.fromkeys((refs.variant.engine, *available.engines()))
    script = refs.torchscript_file
    found = [] if script is None else [BenchmarkTarget(script, available.torch_runtime(engine)) for engine in engines]
    return found + [
        BenchmarkTarget(file, runtime) for file, runtimes in refs.onnx_files.items() for runtime in runtimes
    ]


def evaluate_files(
    shared: SharedStages, variants: tuple[VariantRefs, ...], targets: tuple[BenchmarkTarget, ...], timings: Ref
) -> tuple[VariantRefs, ...]:
    """The variants, each with the files that may be shipped, evaluated in the runtime where each is fastest."""
    gate = shared.recipe.gate.runtimes
    allowed: dict[Ref, list[Runtime]] = {}
    for target in targets:
        if gate is None or target.runtime.kind in gate:
            allowed.setdefault(target.artifact, []).append(target.runtime)
    try:
        samples = read_samples(shared.run.known(timings), targets, timings)
    except NotYetKnownError:
        samples = None

    def runtime_for(file: Ref) -> Runtime:
        if samples is None:
            return cast("Runtime", Pending("benchmark"))
        return fastest_runtime({runtime: samples[file][runtime.name, 1, 1] for runtime in allowed[file]})

    def evaluate_variant(refs: VariantRefs) -> VariantRefs:
        files = tuple(
            _evaluate_in(shared, refs, file, runtime_for(file), refs.variant.name)
            for file in (refs.artifact, *refs.onnx_files)
            if file in allowed
        )
        return replace(refs, files=files)

    return tuple(map(evaluate_variant, variants))


def _evaluate_in(shared: SharedStages, refs: VariantRefs, file: Ref, runtime: Runtime, name: str) -> FileRefs:
    known = refs.reference
    # Float's accuracy is the same in every runtime, up to rounding: it is measured once.
    if refs.variant.engine is None or (file, runtime) == (known.file, known.runtime):
        return replace(known, file=file, runtime=runtime)
    label = runtime.name if isinstance(runtime, Runtime) else "benchmark"
    validation, selection = _evaluate(shared, file, runtime, f"{name}-{label}")
    return FileRefs(file=file, runtime=runtime, validation=validation, selection=selection)


def _simulate(
    shared: SharedStages, model: Ref, name: str, *, uncorrected: Ref | None = None
) -> dict[str, tuple[Ref, ...]]:
    """Answers with weights, activations or both rounded.

    Activations alone are rounded in the model without bias correction, if there is one: a corrected bias makes up for
    rounded weights, and here the weights are not rounded.
    """
    evaluation = shared.recipe.evaluation
    if not evaluation.simulate:
        return {}
    plain = model if uncorrected is None else shared.run(convert, uncorrected, branch=f"{name}-uncorrected")
    return {
        parts: tuple(
            shared.run(
                simulate,
                plain if parts == "activations" else model,
                shard,
                evaluation.batch_size,
                parts,
                branch=label,
            )
            for shard, label in _labelled(shared.validation, name)
        )
        for parts in ("both", "weights", "activations")
    }


def _layers(shared: SharedStages, model: Ref, branch: BranchRecipe) -> tuple[Ref, ...]:
    """The measurements of `layers_of`, if the recipe asks for them."""
    if not shared.recipe.evaluation.layers:
        return ()
    return layers_of(shared, model, branch)


def layers_of(shared: SharedStages, model: Ref, branch: BranchRecipe) -> tuple[Ref, ...]:
    """What each layer costs in accuracy, on the first selection images."""
    reference = _fused(shared, branch, "eval")
    images = shared.inputs.held_out if shared.held_out else shared.inputs.validation
    shard = (shared.held_out or shared.validation)[0]
    num_images = min(_LAYER_IMAGES, images.stop - images.start, shard_size(shared.inputs.transform.input_shape))
    return tuple(
        shared.run(
            measure_layers,
            reference,
            model,
            shard,
            start,
            min(start + _LAYER_IMAGES_PER_STAGE, num_images),
            branch=f"{branch.name}-{n}",
        )
        for n, start in enumerate(range(0, num_images, _LAYER_IMAGES_PER_STAGE))
    )


def _on_shards(
    shared: SharedStages, name: str, measure: Callable[[Ref, str], Ref]
) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
    """Measure on the validation shards and on the selection shards."""
    validation = tuple(measure(shard, label) for shard, label in _labelled(shared.validation, name))
    if not shared.held_out:
        return validation, validation
    return validation, tuple(measure(shard, label) for shard, label in _labelled(shared.held_out, f"{name}-held_out"))


def _labelled(shards: tuple[Ref, ...], name: str) -> list[tuple[Ref, str]]:
    """Each shard with a name for its task run, numbered if there is more than one."""
    return [(shard, f"{name}-{n}" if len(shards) > 1 else name) for n, shard in enumerate(shards)]
