"""How a variant comes to be: which stage feeds which. Called by the flows."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

from quantlib.data.split import Selection
from quantlib.data.transforms import EvalTransform, TrainTransform, Transform
from quantlib.inputs import Inputs
from quantlib.recipe.branches import BranchRecipe, PTQRecipe, QATRecipe
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.schema import Recipe
from quantlib.recipe.scheme import Scheme
from quantlib.report.verdict import fastest_runtime
from quantlib.runtimes import available
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.data import decode
from tasks.export import save_onnx, script_and_save
from tasks.findings import NotYetKnownError, read_samples
from tasks.measure import Contender, evaluate, evaluate_baseline, measure_layers, simulate
from tasks.model import Training, equalize, fuse, load_float
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
from tasks.report import CandidateRefs, EpochRefs, FileRefs, VariantRefs, onnx_file
from tasks.side_by_side import later

T = TypeVar("T")

# A shard of decoded images is what one stage evaluates: so few that no stage takes more than minutes, and that one
# in memory does not matter.
_SHARD_BYTES = 256 * 2**20
_SHARD_IMAGES = 5000
# Each layer costs two passes over these images; a stage takes a part of them, so that none takes more than minutes.
_LAYER_IMAGES = 256
_LAYER_IMAGES_A_STAGE = 64


_SHARING = threading.RLock()


class _shared(cached_property[T]):  # noqa: N801 (a decorator, as its base is)
    """Made by the branch that asks first, while others that ask wait for it."""

    def __get__(self, trunk: Any, owner: Any = None) -> Any:
        with _SHARING:
            return super().__get__(trunk, owner)


@dataclass(frozen=True)
class Trunk:
    """What the branches share: each stage here runs when the first branch asks for it, and for that one only."""

    recipe: Recipe
    inputs: Inputs
    engine: str
    onnx_runtimes: tuple[Runtime, ...]
    float_model: Ref
    validation: tuple[Ref, ...]
    """Decoded shards."""
    held_back: tuple[Ref, ...]
    """Likewise; empty where the recipe chooses on validation."""

    @property
    def runtime(self) -> Runtime:
        """What int8 models are evaluated in while choices are made: TorchScript on their own engine."""
        return available.torch_runtime(self.engine)

    def fused(self, mode: Literal["eval", "qat"], *, equalized: bool) -> Ref:
        """The float model that a branch quantizes."""
        return {
            ("eval", False): lambda: self.fused_eval,
            ("qat", False): lambda: self._fused_qat,
            ("eval", True): lambda: self._fused_eval_equalized,
            ("qat", True): lambda: self._fused_qat_equalized,
        }[mode, equalized]()

    @_shared
    def fused_eval(self) -> Ref:
        """The baseline's model, and of every PTQ branch that is not equalized."""
        return fuse(self.float_model, "eval", branch="eval")

    @_shared
    def calibration(self) -> tuple[Ref, ...]:
        """Decoded shards of the calibration images."""
        recipe, first = self.recipe, self.inputs.training.start
        settings = recipe.calibration
        transform = _eval_transform(recipe) if settings.transform == "eval" else _train_transform(recipe)
        chosen = replace(self.inputs.training, stop=first + settings.batch_size * settings.num_batches)
        return _decode(recipe, chosen, transform, "calibration", settings.batch_size)

    @_shared
    def _equalized(self) -> Ref:
        return equalize(self.float_model, self.recipe.data.crop)

    @_shared
    def _fused_qat(self) -> Ref:
        return fuse(self.float_model, "qat", branch="qat")

    @_shared
    def _fused_eval_equalized(self) -> Ref:
        return fuse(self._equalized, "eval", branch="eval-equalized")

    @_shared
    def _fused_qat_equalized(self) -> Ref:
        return fuse(self._equalized, "qat", branch="qat-equalized")


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
    validation = _decode(recipe, inputs.validation, _eval_transform(recipe), "validation")
    held_back = _decode(recipe, inputs.held_back, _eval_transform(recipe), "held_back")
    onnx_runtimes = available.find_onnx_runtimes(recipe.benchmark.runtimes, recipe.gate.runtimes)
    return Trunk(recipe, inputs, engine, onnx_runtimes, float_model, validation, held_back)


def float_branch(trunk: Trunk) -> VariantRefs:
    """The baseline: fused, scripted, evaluated."""
    artifact = script_and_save(trunk.fused_eval, branch="float")
    onnx = _save_onnx(trunk, artifact, None, "float")
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
        onnx=onnx,
        validation=validation,
        selection=selection,
        simulated={},
    )


def _calibrate(trunk: Trunk, branch: BranchRecipe) -> Ref:
    """Calibrated; its weights and biases are float's."""
    scheme, observed = _scheme(trunk, branch), trunk.fused("eval", equalized=branch.equalizes)
    for shard, label in _labelled(trunk.calibration, branch.name):
        batch_size = trunk.recipe.calibration.batch_size
        observed = calibrate(observed, shard, scheme.float_layers, batch_size, branch=label)
    return choose_ranges(observed, scheme, branch=branch.name)


def _correct(trunk: Trunk, branch: BranchRecipe, calibrated: Ref) -> Ref:
    """Corrected, where the branch asks for it."""
    return correct_bias(calibrated, trunk.calibration, branch=branch.name) if branch.corrects_bias else calibrated


def _scheme(trunk: Trunk, branch: BranchRecipe) -> Scheme:
    return branch.scheme(available.activation_bits(trunk.engine))


def ptq_branch(trunk: Trunk, branch: PTQRecipe) -> VariantRefs:
    """Calibrated, corrected, converted, scripted, evaluated."""
    calibrated = _calibrate(trunk, branch)
    prepared = _correct(trunk, branch, calibrated)
    artifact = _export(trunk, prepared, branch.name)
    validation, selection = _evaluate(trunk, artifact, trunk.runtime, branch.name)
    return VariantRefs(
        name=branch.name,
        method="ptq",
        qconfig=branch.qconfig,
        engine=trunk.engine,
        scheme=_scheme(trunk, branch),
        equalized=branch.equalizes,
        bias_corrected=branch.corrects_bias,
        artifact=artifact,
        prepared=prepared,
        validation=validation,
        selection=selection,
        onnx=_save_onnx(trunk, artifact, trunk.engine, branch.name),
        simulated=_simulate(trunk, prepared, branch.name, in_float=calibrated),
        layers=_layers(trunk, prepared, branch),
    )


def qat_branch(trunk: Trunk, branch: QATRecipe) -> VariantRefs:
    """Each epoch trained, converted, scripted and evaluated; the best one kept, or the start where none is better."""
    schedule = Schedule(
        batches_per_epoch=branch.batches_per_epoch,
        batch_size=branch.batch_size,
        epochs=None if branch.learning_rate_decay == "constant" else branch.epochs,
        learning_rate=branch.learning_rate,
        decay=branch.learning_rate_decay,
        freeze_batch_norm_after_epoch=branch.freeze_batch_norm_after_epoch,
        freeze_observer_after_epoch=branch.freeze_observer_after_epoch,
        seed=trunk.recipe.seed,
    )
    images, scheme = trunk.inputs.training, _scheme(trunk, branch)
    transform = replace(_train_transform(trunk.recipe), scale=branch.train_scale)
    teacher = trunk.fused_eval if branch.distill else None
    state = trunk.fused("qat", equalized=branch.equalizes)
    candidates: list[Future[CandidateRefs]] = []
    states: list[Ref] = []
    if branch.start == "calibrated":
        state = start_qat(state, _correct(trunk, branch, _calibrate(trunk, branch)), branch=branch.name)
        candidates, states = [_candidate(trunk, state, f"{branch.name}-start")], [state]
    metrics: list[Ref] = []
    for epoch in range(branch.epochs):
        state, found = qat_epoch(state, epoch, scheme, schedule, images, transform, teacher, branch=branch.name)
        metrics.append(found)
        candidates.append(_candidate(trunk, state, f"{branch.name}-{epoch}"))
        states.append(state)
        # Only then is there a need to wait: else the next epoch trains while this one is converted.
        patience = branch.patience
        if patience is not None and len(candidates) > patience and has_stalled(_selections(candidates), patience):
            break
    measured = [each.result() for each in candidates]
    best_artifact, best_state = choose_epoch(
        tuple(candidate.artifact for candidate in measured),
        tuple(states),
        tuple(candidate.selection for candidate in measured),
        branch=branch.name,
    )
    start = measured.pop(0) if branch.start == "calibrated" else None
    return VariantRefs(
        name=branch.name,
        method="qat",
        qconfig=branch.qconfig,
        engine=trunk.engine,
        scheme=scheme,
        equalized=branch.equalizes,
        bias_corrected=branch.start == "calibrated" and branch.corrects_bias,
        artifact=best_artifact,
        prepared=best_state,
        start=start,
        onnx=_save_onnx(trunk, best_artifact, trunk.engine, branch.name),
        simulated=_simulate(trunk, best_state, branch.name, in_float=best_state),
        layers=_layers(trunk, best_state, branch),
        epochs=tuple(
            EpochRefs(metrics=found, **vars(candidate)) for found, candidate in zip(metrics, measured, strict=True)
        ),
    )


def _candidate(trunk: Trunk, state: Ref, name: str) -> Future[CandidateRefs]:
    """What a state of QAT would ship, evaluated."""

    def measure() -> CandidateRefs:
        artifact = _export(trunk, state, name)
        validation, selection = _evaluate(trunk, artifact, trunk.runtime, name)
        return CandidateRefs(artifact=artifact, validation=validation, selection=selection)

    return later(measure)


def _selections(candidates: list[Future[CandidateRefs]]) -> list[tuple[Ref, ...]]:
    return [candidate.result().selection for candidate in candidates]


def _export(trunk: Trunk, prepared: Ref, name: str) -> Ref:
    return script_and_save(convert(prepared, trunk.engine, trunk.recipe.data.crop, branch=name), branch=name)


def _eval_transform(recipe: Recipe) -> EvalTransform:
    return EvalTransform(recipe.data.resize, recipe.data.crop)


def _train_transform(recipe: Recipe) -> TrainTransform:
    return TrainTransform(recipe.data.crop, recipe.data.train_scale, recipe.data.train_flip)


def _decode(recipe: Recipe, images: Selection, transform: Transform, name: str, batch_size: int = 1) -> tuple[Ref, ...]:
    """Decoded shards of whole batches, so that the size of a shard changes no batch."""
    size = max(1, _shard_size(recipe) // batch_size) * batch_size
    return tuple(
        decode(part, transform, recipe.seed, branch=f"{name}-{n}") for n, part in enumerate(images.parts(size))
    )


def _shard_size(recipe: Recipe) -> int:
    return max(1, min(_SHARD_IMAGES, _SHARD_BYTES // (3 * recipe.data.crop**2)))


def _evaluate(trunk: Trunk, artifact: Ref, runtime: Runtime, name: str) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
    batch_size = trunk.recipe.evaluation.batch_size
    return _on_shards(trunk, name, lambda shard, label: evaluate(artifact, shard, batch_size, runtime, branch=label))


def _save_onnx(trunk: Trunk, artifact: Ref, engine: str | None, name: str) -> Ref | None:
    """The ONNX file of a variant, or why there is none; None where no runtime for it is installed."""
    if not trunk.onnx_runtimes:
        return None
    crop = trunk.recipe.data.crop
    return save_onnx(artifact, trunk.validation[0], engine, trunk.onnx_runtimes[0], crop, branch=name)


def contenders_of(trunk: Trunk, variant: VariantRefs) -> list[Contender]:
    """A variant's files in every runtime that this machine has for them; its own engine comes first."""
    engines = (None,) if variant.engine is None else dict.fromkeys((variant.engine, *available.engines()))
    found = [Contender(variant.artifact, available.torch_runtime(engine)) for engine in engines]
    onnx = onnx_file(variant)
    if onnx is not None:
        found += [Contender(onnx, runtime) for runtime in trunk.onnx_runtimes]
    return found


def evaluate_files(
    trunk: Trunk, variants: tuple[VariantRefs, ...], contenders: tuple[Contender, ...], timings: Ref
) -> tuple[VariantRefs, ...]:
    """The variants with what may be shipped of each: its files in the runtimes they are fastest in, evaluated there."""
    gate = trunk.recipe.gate.runtimes
    allowed: dict[Ref, list[Runtime]] = {}
    for contender in contenders:
        if gate is None or contender.runtime.kind in gate:
            allowed.setdefault(contender.artifact, []).append(contender.runtime)
    try:
        samples = read_samples(contenders, timings)
    except NotYetKnownError:
        samples = None

    def runtime_for(file: Ref) -> Runtime:
        if samples is None:
            return cast("Runtime", Pending("benchmark"))
        return fastest_runtime({runtime: samples[file][runtime.name, 1, 1] for runtime in allowed[file]})

    def evaluate_variant(variant: VariantRefs) -> VariantRefs:
        files = tuple(
            _evaluate_in(trunk, variant, file, runtime_for(file), f"{variant.name}-{label}")
            for file, label in ((variant.artifact, "pt"), (variant.onnx, "onnx"))
            if file is not None and file in allowed
        )
        return replace(variant, files=files)

    return tuple(map(evaluate_variant, variants))


def _evaluate_in(trunk: Trunk, variant: VariantRefs, file: Ref, runtime: Runtime, name: str) -> FileRefs:
    chosen = variant.chosen
    # Float's accuracy is that of TorchScript, which all else is compared with.
    if variant.engine is None or runtime == trunk.runtime:
        return FileRefs(file=file, runtime=runtime, validation=chosen.validation, selection=chosen.selection)
    validation, selection = _evaluate(trunk, file, runtime, name)
    return FileRefs(file=file, runtime=runtime, validation=validation, selection=selection)


def _simulate(trunk: Trunk, prepared: Ref, name: str, *, in_float: Ref) -> dict[str, tuple[Ref, ...]]:
    """Answers by what is rounded.

    Activations alone are rounded in `in_float`, whose biases are not corrected: a corrected bias makes up for rounded
    weights, which are not there then.
    """
    evaluation = trunk.recipe.evaluation
    if not evaluation.simulate:
        return {}
    return {
        parts: tuple(
            simulate(
                in_float if parts == "activations" else prepared, shard, evaluation.batch_size, parts, branch=label
            )
            for shard, label in _labelled(trunk.validation, name)
        )
        for parts in ("both", "weights", "activations")
    }


def _layers(trunk: Trunk, prepared: Ref, branch: BranchRecipe) -> tuple[Ref, ...]:
    """As `layers_of`, where the recipe asks for it of every variant."""
    if not trunk.recipe.evaluation.layers:
        return ()
    return layers_of(trunk, prepared, branch.name, equalized=branch.equalizes)


def layers_of(trunk: Trunk, prepared: Ref, name: str, *, equalized: bool) -> tuple[Ref, ...]:
    """What each layer costs, on the first of the images that choices are made by."""
    reference = trunk.fused("eval", equalized=equalized)
    images = trunk.inputs.held_back if trunk.held_back else trunk.inputs.validation
    shard = (trunk.held_back or trunk.validation)[0]
    num_images = min(_LAYER_IMAGES, images.stop - images.start, _shard_size(trunk.recipe))
    return tuple(
        measure_layers(
            reference,
            prepared,
            shard,
            start,
            min(start + _LAYER_IMAGES_A_STAGE, num_images),
            branch=f"{name}-{n}",
        )
        for n, start in enumerate(range(0, num_images, _LAYER_IMAGES_A_STAGE))
    )


def _on_shards(trunk: Trunk, name: str, measure: Callable[[Ref, str], Ref]) -> tuple[tuple[Ref, ...], tuple[Ref, ...]]:
    """Measure on the validation shards, and on those that choices are made by."""
    validation = tuple(measure(shard, label) for shard, label in _labelled(trunk.validation, name))
    if not trunk.held_back:
        return validation, validation
    return validation, tuple(measure(shard, label) for shard, label in _labelled(trunk.held_back, f"{name}-held_back"))


def _labelled(shards: tuple[Ref, ...], name: str) -> list[tuple[Ref, str]]:
    """Each shard with a task run's name; numbered where there are more than one."""
    return [(shard, f"{name}-{n}" if len(shards) > 1 else name) for n, shard in enumerate(shards)]
