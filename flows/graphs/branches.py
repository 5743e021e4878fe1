"""How a variant is made: which stage feeds which. Called by the flows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from flows.graphs.evaluation import (
    evaluate_candidate,
    evaluate_float,
    evaluate_simulated,
    find_reference,
    label_shards,
    save_files,
    try_engines,
)
from flows.graphs.shared_stages import SharedStages, shard_size, train_transform
from quantlib.recipe.branches import BranchRecipe, PTQRecipe, QATRecipe
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.scheme import Scheme
from quantlib.recipe.variant import Variant
from quantlib.store.artifacts import Ref
from tasks.measure import measure_layers
from tasks.model import plan_layers
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
from tasks.refs import CandidateRefs, EpochRefs, FileRefs, VariantRefs
from tasks.run import NotYetKnownError, together

# Each layer costs two passes over these images. A stage takes only some of them, to finish within minutes.
_LAYER_IMAGES = 256
_LAYER_IMAGES_PER_STAGE = 64


def float_branch(shared: SharedStages) -> VariantRefs:
    """The baseline: fused, exported, evaluated."""
    model = shared.fused_eval
    saved = shared.run.begin(lambda: save_files(shared, model, "float", None))
    reference = evaluate_float(shared, find_reference(shared, model, "float", None))
    return VariantRefs(variant=Variant(name="float", method="float"), saved=saved(), reference=reference)


def _fused(shared: SharedStages, branch: BranchRecipe, mode: Literal["eval", "qat"]) -> Ref:
    return shared.fused(mode, equalized=branch.equalizes, smoothing=branch.smooths)


def _calibrate(shared: SharedStages, branch: BranchRecipe) -> Ref:
    """The calibrated model; its weights and biases are still float's."""
    scheme, observed = _scheme(shared, branch), _fused(shared, branch, "eval")
    for shard, label in label_shards(shared.calibration, branch.name):
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
    return branch.scheme(shared.run.machine.activation_bits(shared.engine))


def ptq_branch(shared: SharedStages, branch: PTQRecipe) -> VariantRefs:
    """A PTQ variant: calibrated, corrected, converted, exported."""
    run, name = shared.run, branch.name
    calibrated = _calibrate(shared, branch)
    model = run(convert, _correct(shared, branch, calibrated), branch=name)
    uncorrected = calibrated if branch.corrects_bias else None
    reference = run.begin(lambda: find_reference(shared, model, name, shared.engine))
    plan = run.begin(lambda: _plan(shared, branch))
    engines = run.begin(lambda: try_engines(shared, model, name))
    saved = run.begin(lambda: save_files(shared, model, name, shared.engine))
    simulated = run.begin(lambda: evaluate_simulated(shared, model, name, uncorrected=uncorrected))
    layers = run.begin(lambda: _layers(shared, model, branch))
    return VariantRefs(
        variant=_variant(shared, branch, "ptq", bias_corrected=branch.corrects_bias),
        reference=reference(),
        model=model,
        plan=plan(),
        engines=engines(),
        saved=saved(),
        simulated=simulated(),
        layers=layers(),
    )


def qat_branch(shared: SharedStages, branch: QATRecipe) -> VariantRefs:
    """A QAT variant: each epoch trained, converted, scripted, evaluated; the best is kept, or else the start."""
    candidates, metrics = _train(shared, branch)
    best_model, best_file, choice = shared.run(
        choose_epoch,
        tuple(candidate.model for candidate in candidates),
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
    run, name = shared.run, branch.name
    plan = run.begin(lambda: _plan(shared, branch))
    engines = run.begin(lambda: try_engines(shared, best_model, name))
    saved = run.begin(lambda: save_files(shared, best_model, name, shared.engine))
    simulated = run.begin(lambda: evaluate_simulated(shared, best_model, name))
    layers = run.begin(lambda: _layers(shared, best_model, branch))
    return VariantRefs(
        variant=_variant(shared, branch, "qat", bias_corrected=branch.start == "calibrated" and branch.corrects_bias),
        model=best_model,
        plan=plan(),
        reference=best.reference if best else FileRefs(file=best_file, runtime=candidates[0].reference.runtime),
        best_epoch=best_epoch,
        start=start,
        engines=engines(),
        saved=saved(),
        simulated=simulated(),
        layers=layers(),
        epochs=tuple(
            EpochRefs(metrics=found, **vars(candidate)) for found, candidate in zip(metrics, epochs, strict=True)
        ),
    )


def _train(shared: SharedStages, branch: QATRecipe) -> tuple[list[CandidateRefs], list[Ref]]:
    """The candidates of QAT, evaluated: the start, if it is a calibrated model, and each epoch; and epochs' metrics.

    The epochs are trained in order. An epoch need not wait for the evaluation of those before it, unless a stall ends
    the training.
    """
    run, schedule = shared.run, _schedule(branch, shared.recipe.seed)
    images, scheme = shared.inputs.training, _scheme(shared, branch)
    transform = replace(train_transform(shared.recipe, shared.inputs), scale=branch.train_scale)
    teacher = shared.fused_eval if branch.distill else None
    state = _fused(shared, branch, "qat")
    candidates: list[Callable[[], CandidateRefs]] = []
    if branch.start == "calibrated":
        calibrated = _correct(shared, branch, _calibrate(shared, branch))
        state = run(start_qat, state, calibrated, branch=branch.name)
        candidates.append(run.begin(partial(evaluate_candidate, shared, state, f"{branch.name}-start")))
    metrics: list[Ref] = []
    for epoch in range(branch.epochs):
        state, found = run(qat_epoch, state, epoch, scheme, schedule, images, transform, teacher, branch=branch.name)
        metrics.append(found)
        candidates.append(run.begin(partial(evaluate_candidate, shared, state, f"{branch.name}-{epoch}")))
        if branch.patience is not None and _has_stalled(shared, [wait() for wait in candidates], branch.patience):
            break
    return [wait() for wait in candidates], metrics


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
        smoothing=branch.smooths,
        bias_corrected=bias_corrected,
    )


def _has_stalled(shared: SharedStages, candidates: list[CandidateRefs], patience: int) -> bool:
    """Whether to stop training early; a plan that cannot know goes through every epoch."""
    try:
        return len(candidates) > patience and has_stalled(
            shared.run, [candidate.reference.selection for candidate in candidates], patience
        )
    except NotYetKnownError:
        return False


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
    parts = [
        (start, min(start + _LAYER_IMAGES_PER_STAGE, num_images))
        for start in range(0, num_images, _LAYER_IMAGES_PER_STAGE)
    ]
    return together(
        shared.run,
        [
            partial(shared.run, measure_layers, reference, model, shard, *part, branch=f"{branch.name}-{n}")
            for n, part in enumerate(parts)
        ],
    )
