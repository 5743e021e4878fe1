"""How a variant comes to be: which stage feeds which. Called by the flows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from quantlib import machine
from quantlib.inputs import Inputs, Selection
from quantlib.recipe import BranchRecipe, PTQRecipe, QATRecipe, Recipe
from quantlib.schedule import Schedule
from quantlib.scheme import Scheme
from quantlib.store import Ref
from quantlib.transforms import EvalTransform, TrainTransform, Transform
from tasks.data import decode
from tasks.export import script_and_save
from tasks.measure import evaluate, evaluate_baseline, simulate
from tasks.model import Training, equalize, fuse, load_float
from tasks.quantize import calibrate, choose_epoch, convert, correct_bias, has_stalled, qat_epoch, start_qat
from tasks.report import EpochRefs, VariantRefs

# A shard of decoded images is what one stage evaluates: so few that no stage takes more than minutes, and that one
# in memory does not matter.
_SHARD_BYTES = 256 * 2**20
_SHARD_IMAGES = 5000


@dataclass(frozen=True)
class Trunk:
    """What every branch shares."""

    recipe: Recipe
    inputs: Inputs
    engine: str
    float_model: Ref
    fused: Ref
    """Fused in mode "eval": the baseline's."""
    validation: tuple[Ref, ...]
    """Decoded shards."""
    held_back: tuple[Ref, ...]
    """Likewise; empty where the recipe chooses on validation."""


def grow_trunk(recipe: Recipe, inputs: Inputs, engine: str) -> Trunk:
    """Load the float model, and decode the images that accuracy is measured on."""
    training = Training(inputs.training, _train_transform(recipe), recipe.model.training)
    float_model = load_float(
        inputs.model,
        inputs.val.num_classes,
        recipe.data.crop,
        recipe.seed,
        training if recipe.model.weights == "train" else None,
    )
    fused = fuse(float_model, "eval", branch="eval")
    validation = _decode(recipe, inputs.validation, _eval_transform(recipe), "validation")
    held_back = _decode(recipe, inputs.held_back, _eval_transform(recipe), "held_back")
    return Trunk(recipe, inputs, engine, float_model, fused, validation, held_back)


def float_branch(trunk: Trunk) -> VariantRefs:
    """The baseline: fused, scripted, evaluated."""
    artifact = script_and_save(trunk.fused, branch="float")
    batch_size = trunk.recipe.evaluation.batch_size
    validation, selection = _on_shards(
        trunk, "float", lambda shard, name: evaluate_baseline(artifact, shard, batch_size, branch=name)
    )
    return VariantRefs(
        name="float",
        method="float",
        qconfig=None,
        engine=None,
        scheme=None,
        equalized=False,
        bias_corrected=False,
        artifact=artifact,
        validation=validation,
        selection=selection,
        simulated={},
    )


def ptq_branches(trunk: Trunk) -> list[VariantRefs]:
    """Every post-training quantization branch; they share the calibration images."""
    if not trunk.recipe.ptq:
        return []
    images = _calibration_images(trunk)
    return [_ptq_branch(trunk, branch, images) for branch in trunk.recipe.ptq]


def qat_branches(trunk: Trunk) -> list[VariantRefs]:
    """Every quantization-aware training branch; they share the model fused for training."""
    if not trunk.recipe.qat:
        return []
    return [_qat_branch(trunk, branch) for branch in trunk.recipe.qat]


def _calibration_images(trunk: Trunk) -> tuple[Ref, ...]:
    recipe = trunk.recipe
    calibration = recipe.calibration
    transform = _eval_transform(recipe) if calibration.transform == "eval" else _train_transform(recipe)
    first = trunk.inputs.training.start
    chosen = replace(trunk.inputs.training, stop=first + calibration.batch_size * calibration.num_batches)
    return _decode(recipe, chosen, transform, "calibration")


def _fused(trunk: Trunk, branch: BranchRecipe, mode: Literal["eval", "qat"]) -> Ref:
    """The float model that a branch quantizes; the stages are shared by all branches that ask for the same."""
    if not branch.equalizes:
        return trunk.fused if mode == "eval" else fuse(trunk.float_model, mode, branch=mode)
    equalized = equalize(trunk.float_model, trunk.recipe.data.crop)
    return fuse(equalized, mode, branch=f"{mode}-equalized")


def _calibrate(trunk: Trunk, branch: BranchRecipe, images: tuple[Ref, ...], name: str) -> Ref:
    """Calibrated, and corrected where the branch asks for it."""
    batch_size = trunk.recipe.calibration.batch_size
    prepared = calibrate(_fused(trunk, branch, "eval"), images, _scheme(trunk, branch), batch_size, branch=name)
    return correct_bias(prepared, images, branch=name) if branch.corrects_bias else prepared


def _scheme(trunk: Trunk, branch: BranchRecipe) -> Scheme:
    return branch.scheme(machine.activation_bits(trunk.engine))


def _ptq_branch(trunk: Trunk, branch: PTQRecipe, images: tuple[Ref, ...]) -> VariantRefs:
    """Calibrated, corrected, converted, scripted, evaluated."""
    prepared = _calibrate(trunk, branch, images, branch.name)
    artifact = _export(trunk, prepared, branch.name)
    validation, selection = _evaluate(trunk, artifact, branch.name)
    return VariantRefs(
        name=branch.name,
        method="ptq",
        qconfig=branch.qconfig,
        engine=trunk.engine,
        scheme=_scheme(trunk, branch),
        equalized=branch.equalizes,
        bias_corrected=branch.corrects_bias,
        artifact=artifact,
        validation=validation,
        selection=selection,
        simulated=_simulate(trunk, prepared, branch.name),
    )


def _qat_branch(trunk: Trunk, branch: QATRecipe) -> VariantRefs:
    """Each epoch trained, converted, scripted and evaluated; the best one kept."""
    schedule = Schedule(
        batches_per_epoch=branch.batches_per_epoch,
        batch_size=branch.batch_size,
        epochs=branch.epochs,
        learning_rate=branch.learning_rate,
        decay=branch.learning_rate_decay,
        freeze_batch_norm_after_epoch=branch.freeze_batch_norm_after_epoch,
        freeze_observer_after_epoch=branch.freeze_observer_after_epoch,
        seed=trunk.recipe.seed,
    )
    images, scheme = trunk.inputs.training, _scheme(trunk, branch)
    transform = replace(_train_transform(trunk.recipe), scale=branch.train_scale)
    teacher = trunk.fused if branch.distill else None
    states, start = [_fused(trunk, branch, "qat")], None
    if branch.start == "calibrated":
        calibrated = _calibrate(trunk, branch, _calibration_images(trunk), branch.name)
        states = [start_qat(states[0], calibrated, branch=branch.name)]
        start = _evaluate(trunk, _export(trunk, states[0], f"{branch.name}-start"), f"{branch.name}-start")
    epochs: list[EpochRefs] = []
    for epoch in range(branch.epochs):
        state, metrics = qat_epoch(states[-1], epoch, scheme, schedule, images, transform, teacher, branch=branch.name)
        states.append(state)
        name = f"{branch.name}-{epoch}"
        artifact = _export(trunk, state, name)
        validation, selection = _evaluate(trunk, artifact, name)
        epochs.append(EpochRefs(artifact=artifact, metrics=metrics, validation=validation, selection=selection))
        if branch.patience is not None and has_stalled([refs.selection for refs in epochs], branch.patience):
            break
    best_artifact, best_state = choose_epoch(
        tuple(epoch.artifact for epoch in epochs),
        tuple(states[1:]),
        tuple(epoch.selection for epoch in epochs),
        branch=branch.name,
    )
    return VariantRefs(
        name=branch.name,
        method="qat",
        qconfig=branch.qconfig,
        engine=trunk.engine,
        scheme=scheme,
        equalized=branch.equalizes,
        bias_corrected=branch.start == "calibrated" and branch.corrects_bias,
        artifact=best_artifact,
        start=start,
        simulated=_simulate(trunk, best_state, branch.name),
        epochs=tuple(epochs),
    )


def _export(trunk: Trunk, prepared: Ref, name: str) -> Ref:
    return script_and_save(convert(prepared, trunk.engine, trunk.recipe.data.crop, branch=name), branch=name)


def _eval_transform(recipe: Recipe) -> EvalTransform:
    return EvalTransform(recipe.data.resize, recipe.data.crop)


def _train_transform(recipe: Recipe) -> TrainTransform:
    return TrainTransform(recipe.data.crop, recipe.data.train_scale, recipe.data.train_flip)


def _decode(recipe: Recipe, images: Selection, transform: Transform, name: str) -> tuple[Ref, ...]:
    size = max(1, min(_SHARD_IMAGES, _SHARD_BYTES // (3 * recipe.data.crop**2)))
    return tuple(
        decode(part, transform, recipe.seed, branch=f"{name}-{n}") for n, part in enumerate(images.parts(size))
    )


def _evaluate(trunk: Trunk, artifact: Ref, name: str) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
    batch_size = trunk.recipe.evaluation.batch_size
    return _on_shards(
        trunk, name, lambda shard, label: evaluate(artifact, shard, batch_size, trunk.engine, branch=label)
    )


def _simulate(trunk: Trunk, prepared: Ref, name: str) -> dict[str, tuple[Ref, ...]]:
    evaluation = trunk.recipe.evaluation
    if not evaluation.simulate:
        return {}
    return {
        parts: tuple(
            simulate(prepared, shard, evaluation.batch_size, parts, branch=label)
            for shard, label in _labelled(trunk.validation, name)
        )
        for parts in ("both", "weights", "activations")
    }


def _on_shards(trunk: Trunk, name: str, measure: Callable[[Ref, str], Ref]) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
    """Measure on the validation shards, and on those that choices are made by."""
    validation = tuple(measure(shard, label) for shard, label in _labelled(trunk.validation, name))
    if not trunk.held_back:
        return validation, validation
    return validation, tuple(measure(shard, label) for shard, label in _labelled(trunk.held_back, f"{name}-held_back"))


def _labelled(shards: tuple[Ref, ...], name: str) -> list[tuple[Ref, str]]:
    """Each shard with a task run's name; numbered where there are more than one."""
    return [(shard, f"{name}-{n}" if len(shards) > 1 else name) for n, shard in enumerate(shards)]
