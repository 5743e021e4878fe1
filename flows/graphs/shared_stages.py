"""Stages that the branches of a run share: the float model, the fused models, the decoded images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, overload

from quantlib.data.split import Subset
from quantlib.data.transforms import TrainTransform, Transform
from quantlib.inputs import Inputs
from quantlib.recipe.interface import Interface
from quantlib.recipe.schema import Recipe
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.data import decode
from tasks.export import draft_onnx
from tasks.model import Training, equalize, fuse, load_float, smooth
from tasks.run import Run, together

# One stage evaluates one shard of decoded images: small enough that no stage takes more than minutes, and that its
# memory does not matter.
_SHARD_BYTES = 256 * 2**20
_SHARD_IMAGES = 5000
# Where evaluation ends once the verdict is certain, that is asked after each shard. Often a few hundred images do.
_STOPPING_SHARD_IMAGES = 250


@dataclass(frozen=True)
class SharedStages:
    """What the branches share: each stage here runs once, when the first branch asks for it."""

    run: Run
    recipe: Recipe
    inputs: Inputs
    engine: str
    other_runtimes: tuple[Runtime, ...]
    """Those besides TorchScript that files are written for."""
    float_model: Ref
    validation: Sequence[Ref]
    """Decoded shards; where evaluation may stop early, each is decoded when it is first asked for."""
    held_out: tuple[Ref, ...]
    """Decoded shards; empty if the recipe selects on validation."""

    def runtimes(self, engine: str | None) -> tuple[Runtime, ...]:
        """Those that a model's files are written for: TorchScript's engine, None for float, and the others.

        Those that the recipe allows the model to be shipped for are first.
        """
        own = (self.run.machine.torch_runtime(engine),) if self.recipe.has_torchscript else ()
        return tuple(sorted((*own, *self.other_runtimes), key=lambda runtime: not self.may_ship(runtime)))

    def may_ship(self, runtime: Runtime) -> bool:
        """Whether the recipe allows a file to be shipped for a runtime."""
        allowed = self.recipe.gate.runtimes
        return allowed is None or runtime.kind in allowed

    @property
    def interface(self) -> Interface:
        """What the exported files take and give."""
        return self.recipe.export.interface

    def fused(self, mode: Literal["eval", "qat"], *, equalized: bool = False, smoothing: float | None = None) -> Ref:
        """The float model that a branch quantizes."""
        model = self._rescaled(equalized, smoothing)
        name = mode + ("-equalized" if equalized else "") + ("" if smoothing is None else f"-smoothed-{smoothing}")
        return self.run.once(f"fuse-{name}", lambda: self.run(fuse, model, mode, branch=name))

    @property
    def fused_eval(self) -> Ref:
        """The fused model of the baseline and of every PTQ branch that rescales nothing."""
        return self.fused("eval")

    @property
    def onnx_draft(self) -> Ref:
        """The ONNX graph that every variant's files are filled into."""
        return self.run.once("draft_onnx", lambda: self.run(draft_onnx, self.fused_eval, self.run.machine.exporter))

    @property
    def calibration(self) -> tuple[Ref, ...]:
        """Decoded shards of the calibration images."""
        return self.run.once("calibration", self._decode_calibration)

    def _decode_calibration(self) -> tuple[Ref, ...]:
        recipe, first = self.recipe, self.inputs.training.start
        settings = recipe.calibration
        transform = self.inputs.transform if settings.transform == "eval" else train_transform(recipe, self.inputs)
        chosen = replace(self.inputs.training, stop=first + settings.batch_size * settings.num_batches)
        return _decode(self.run, recipe, chosen, transform, "calibration", settings.batch_size)

    def _rescaled(self, equalized: bool, smoothing: float | None) -> Ref:
        """The float model, equalized and smoothed as asked."""
        model = self.float_model
        if equalized:
            model = self.run.once("equalize", lambda: self.run(equalize, self.float_model))
        if smoothing is None:
            return model
        name, before = f"{smoothing}{'-equalized' if equalized else ''}", model
        return self.run.once(
            f"smooth-{name}", lambda: self.run(smooth, before, smoothing, self.calibration, branch=name)
        )


def share_stages(run: Run, recipe: Recipe, inputs: Inputs, engine: str) -> SharedStages:
    """Load the float model and decode the images that accuracy is measured on."""
    training = Training(inputs.training, train_transform(recipe, inputs), recipe.model.training)
    float_model = run.begin(
        lambda: run(
            load_float,
            inputs.model,
            inputs.val.num_classes,
            inputs.transform.input_shape,
            recipe.seed,
            training if recipe.model.weights == "train" else None,
        )
    )
    validation = run.begin(lambda: _validation(run, recipe, inputs))
    held_out = run.begin(lambda: _decode(run, recipe, inputs.held_out, inputs.transform, "held_out"))
    others = run.machine.find_runtimes(recipe.benchmark.runtimes, recipe.gate.runtimes)
    return SharedStages(run, recipe, inputs, engine, others, float_model(), validation(), held_out())


def train_transform(recipe: Recipe, inputs: Inputs) -> TrainTransform:
    """How an image becomes a model's input in training."""
    own, data = inputs.transform, recipe.data
    return TrainTransform(
        crop=own.crop,
        interpolation=own.interpolation,
        normalization=own.normalization,
        scale=data.train_scale,
        flip=data.train_flip,
    )


class _LazyShards(Sequence[Ref]):
    """Shards that are decoded when they are first asked for."""

    def __init__(self, shards: Sequence[Callable[[], Ref]]) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, place: int) -> Ref: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Ref, ...]: ...
    def __getitem__(self, place: int | slice) -> Ref | tuple[Ref, ...]:
        if isinstance(place, slice):
            return tuple(shard() for shard in self._shards[place])
        return self._shards[place]()


def _validation(run: Run, recipe: Recipe, inputs: Inputs) -> Sequence[Ref]:
    transform = inputs.transform
    if not recipe.may_stop:
        return _decode(run, recipe, inputs.validation, transform, "validation")
    size = min(_STOPPING_SHARD_IMAGES, shard_size(transform.input_shape))
    return _LazyShards(
        [
            partial(
                run.once,
                f"decode-validation-{n}",
                partial(run, decode, part, transform, recipe.seed, branch=f"validation-{n}"),
            )
            for n, part in enumerate(inputs.validation.parts(size))
        ]
    )


def _decode(
    run: Run, recipe: Recipe, images: Subset, transform: Transform, name: str, batch_size: int = 1
) -> tuple[Ref, ...]:
    """Decoded shards of whole batches: the size of a shard must change no batch."""
    size = max(1, shard_size(transform.input_shape) // batch_size) * batch_size
    parts = enumerate(images.parts(size))
    return together(
        run, [partial(run, decode, part, transform, recipe.seed, branch=f"{name}-{n}") for n, part in parts]
    )


def shard_size(input_shape: tuple[int, int, int]) -> int:
    """Images per shard."""
    return max(1, min(_SHARD_IMAGES, _SHARD_BYTES // math.prod(input_shape)))
