"""The recipe's tables, except its branches."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from quantlib.recipe.fields import MAX_INT, Arguments, Count, Flag, Fraction, Line, PathName, Pixels, Size
from quantlib.recipe.interface import InputKind, Interface, Layout

TORCHVISION = "torchvision:"
TIMM = "timm:"
"""Before the name of a published architecture, or of published weights."""
FILE = "file:"
"""Before the path of an exported model."""


EngineName = Literal["auto", "x86", "fbgemm", "onednn", "qnnpack"]


Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


RuntimeName = Literal["torchscript", "onnxruntime", "openvino", "executorch", "torch_export"]


_BatchOfTwo = Annotated[int, Field(gt=1, le=MAX_INT, strict=True)]


_LearningRate = Annotated[float, Field(gt=0.0, le=1000.0, strict=True)]


def _one_at_least(runtimes: tuple[RuntimeName, ...]) -> tuple[RuntimeName, ...]:
    if not runtimes:
        raise ValueError("name at least one runtime, or leave it out")
    return runtimes


_Runtimes = Annotated[tuple[RuntimeName, ...], Field(max_length=16), AfterValidator(_one_at_least)]


_Means = Annotated[tuple[Annotated[float, Field(ge=-1000.0, le=1000.0)], ...], Field(max_length=3)]


_Deviations = Annotated[tuple[Annotated[float, Field(gt=0.0, le=1000.0)], ...], Field(max_length=3)]


_MAX_BRANCHES = 1000


class Section(BaseModel):
    """A frozen table of the recipe; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    """Return the smallest and largest share of an image that a random crop takes, unchanged.

    Raises:
        ValueError: If they are out of order.
    """
    if not 0.0 < scale[0] <= scale[1]:
        raise ValueError("must be [least, most] with 0 < least <= most <= 1")
    return scale


class TrainingRecipe(Section):
    """How to train the float model from scratch, when `weights = "train"`."""

    epochs: Count = 12
    """Passes over the training split."""
    batch_size: _BatchOfTwo = 64
    """Images per step."""
    learning_rate: _LearningRate = 0.05
    """Peak learning rate of SGD with Nesterov momentum 0.9 and a one-cycle schedule."""


class ModelRecipe(Section):
    """The float model: its architecture and where its weights come from."""

    architecture: Line = "mobilenet_v2"
    """mobilenet_v2; "torchvision:NAME" or "timm:NAME"; "file:MODEL.pt2", which torch.export.save wrote; or
    "package.module:function", which returns an nn.Module."""
    arguments: Arguments = {}
    """Keyword arguments of the architecture; `num_classes` is taken from the data if it is not given."""
    weights: PathName | None = None
    """A state_dict file, .pth or .safetensors; "torchvision:NAME"; "timm:TAG"; or "train". With "file:MODEL.pt2" it may
    be absent: the file's own."""
    training: TrainingRecipe = TrainingRecipe()
    """Used when `weights = "train"`."""

    @model_validator(mode="after")
    def _file_holds_everything(self) -> Self:
        is_exported = self.architecture.startswith(FILE)
        if self.weights is None and not is_exported:
            raise ValueError('weights is missing: give a state_dict file, "torchvision:NAME", "timm:TAG" or "train"')
        if is_exported and self.weights is not None and not is_weights_file(self.weights):
            raise ValueError(
                f"weights = {self.weights!r} is not for an exported model: give a state_dict file, or none"
            )
        if is_exported and self.arguments:
            raise ValueError(
                "arguments are not for an exported model, which cannot be built in another way: remove them"
            )
        return self


class DataRecipe(Section):
    """The images, and how they become the model's input."""

    format: Line
    """imagefolder: train/CLASS/IMAGE and val/CLASS/IMAGE (val may be called valid, validation or test); classfolders:
    CLASS/IMAGE, a fifth of each class for validation, chosen by the hashes of the names; imagenet; cifar10; digits; or
    "package.module:function" called as f(root, split)."""
    root: PathName | None = None
    """The dataset's folder, relative to the recipe file."""
    resize: Pixels | Size | None = None
    """Shorter side in pixels before the centre crop (evaluation), or [height, width]; default: as the weights say, else
    256."""
    crop: Pixels | Size | None = None
    """Side in pixels of the model's input, or [height, width]; default: as the weights say, else 224."""
    interpolation: Interpolation | None = None
    """How images are resized; default: as the weights say, else bilinear."""
    channels: Literal[1, 3] = 3
    """Channels of the model's input: 3 for RGB, 1 for grey, which needs `mean` and `std`."""
    mean: _Means | None = None
    """Mean of each channel that the model was trained with, for pixels in [0, 1]; default: as the weights say, else
    ImageNet's."""
    std: _Deviations | None = None
    """Standard deviation of each channel that the model was trained with; default: like `mean`."""
    train_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Share of the image's area that a random training crop takes: smallest and largest."""
    train_flip: Fraction = 0.5
    """Probability that a training image is mirrored."""

    @field_validator("train_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        return check_scale(scale)

    @model_validator(mode="after")
    def _normalization_of_each_channel(self) -> Self:
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{key} has {len(values)} values for {self.channels} channels; give one per channel")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both, or neither")
        if self.channels == 1 and self.mean is None:
            raise ValueError("channels = 1 needs mean and std, as the model was trained with")
        return self


class EvaluationRecipe(Section):
    """How accuracy is measured, and which images the run may use to choose."""

    batch_size: Count = 50
    """Images per forward pass."""
    max_images: Count | None = None
    """Evaluate only this many validation images, drawn by `seed`; absent: all of them."""
    select_on: Literal["held_out", "validation"] = "held_out"
    """Images that QAT's best epoch and the winner are chosen on: training images held out from calibration and
    training, or the validation split itself (its figures are then optimistic, and the report says so)."""
    stop: Literal["certain", "never"] | None = None
    """certain: images are evaluated in random order, 250 at a time, and a variant's evaluation ends once the interval
    of its drop in top-1, which holds however often one looks, lies inside or outside the gate; its confidence is
    `gate.confidence`, else 95%. Takes held-out images to choose by. never: all images are evaluated. Absent: certain
    for the search's trials, never for others. QAT's epochs are evaluated on all images."""
    num_held_out: Count | None = None
    """Training images held out, with `select_on = "held_out"`; absent: a tenth of them, at most 1000."""
    simulate: Flag = False
    """Also measure every quantized model with fake quantization in float: both, weights only, activations only. This
    shows which of the two costs accuracy. Weights only: as shipped, with the biases that were corrected for them.
    Activations only: with the float model's weights and biases; for QAT, with the trained ones."""
    num_examples: Annotated[int, Field(ge=0, le=10_000, strict=True)] = 12
    """Validation images kept as small pictures in the report, per variant, out of those that it answers differently
    from float. 0: none."""
    layers: Flag = False
    """Also measure every layer of every quantized model (the table `layers`), on 256 of the selection images: two
    forward passes per layer."""

    @model_validator(mode="after")
    def _stop_needs_held_out(self) -> Self:
        if self.stop == "certain" and self.select_on == "validation":
            raise ValueError(
                'stop = "certain" with select_on = "validation" saves no image, as choices need all of them: leave one '
                "of them out"
            )
        return self


class CalibrationRecipe(Section):
    """The training images that activation ranges are taken from."""

    batch_size: Count = 30
    """Images per forward pass."""
    num_batches: Count = 32
    """Number of batches; the images come from the training split, never from validation."""
    transform: Literal["eval", "train"] = "eval"
    """"eval": resize and centre crop; "train": random crops and flips."""


class ExportRecipe(Section):
    """What the exported files take and give; accuracy and latency are measured on files of this kind."""

    input: InputKind = "float"
    """float: normalized float32 images [N, C, H, W]; uint8: the pixels of the crop, which the file normalizes
    itself."""
    layout: Layout = "nchw"
    """Order of the dimensions of uint8 pixels: nchw, or nhwc, as decoders of images give them."""
    softmax: Flag = False
    """The file gives probabilities instead of logits."""

    @model_validator(mode="after")
    def _layout_of_pixels(self) -> Self:
        if self.input == "float" and self.layout != "nchw":
            raise ValueError('layout = "nhwc" is for pixels: set input = "uint8", or leave layout out')
        return self

    @property
    def interface(self) -> Interface:
        """The same as the stages take it."""
        return Interface(input=self.input, layout=self.layout, softmax=self.softmax)


class BenchmarkRecipe(Section):
    """What is timed: every batch size with every number of threads."""

    batch_sizes: Annotated[tuple[Count, ...], Field(max_length=64)] = (1,)
    """Images per call; 1 is always timed, as the report's `latency_p50_ms`."""
    num_threads: Annotated[tuple[Annotated[int, Field(gt=0, le=1024, strict=True)], ...], Field(max_length=64)] = (1,)
    """Number of torch threads; 1 is always timed."""
    runtimes: _Runtimes | None = None
    """Runtimes that models are exported for and timed in; torchscript stands for each of torch's engines. Absent: those
    that the gate names; else torchscript and every installed runtime for ONNX."""
    num_samples: Annotated[int, Field(ge=10, le=1_000_000, strict=True)] = 50
    """Most timed calls per model and runtime, in turn, after a warm-up. One image on one thread is timed at least ten
    times, and until the order of the files is certain, files that differ by less than 2% in any order; other settings,
    which only the report shows, 2 to 20 times, slow ones less often."""


class SearchRecipe(Section):
    """Variants found by trial: the fastest that loses no more than a budget; see `quantlib.search`."""

    max_top1_drop: Fraction = 0.002
    """The budget: how much top-1 may be lost against float, as a fraction. The gate has the same: given in [gate], it
    may be absent here. Trials are judged on the selection images, the winner by the gate."""
    max_trials: Annotated[int, Field(gt=0, le=_MAX_BRANCHES, strict=True)] = 13
    """Most variants to try; each is a branch in the report."""
    max_minutes: Annotated[float, Field(gt=0.0, le=1_000_000.0, strict=True)] = 120.0
    """No trial starts once the search's stages have taken this many minutes; one that has started is completed. A
    reused stage counts as long as it took to compute, so a resumed or repeated search ends where an uninterrupted one
    would have."""


class GateRecipe(Section):
    """How much accuracy the winner may lose."""

    max_top1_drop: Fraction = 0.01
    """Largest accepted loss of top-1 against float, as a fraction: 0.01 is one point. With a [search]: its budget."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] | None = None
    """How sure the gate must be: it then accepts a variant only if the whole interval of this confidence around its
    drop is inside; absent: only the drop itself counts."""
    min_speedup: Annotated[float, Field(ge=0.0, le=1000.0, strict=True)] = 1.0
    """Least accepted speed, as a multiple of float's in its fastest allowed runtime: a file that is slower, beyond the
    noise of timing, is never shipped. 0: any speed will do."""
    runtimes: _Runtimes | None = None
    """Runtimes that the model may be shipped for: a file is judged and recommended in one of them; absent: in any that
    `benchmark.runtimes` times."""

    fail_on_regression: Flag = False
    """Whether a run fails if its winner is less accurate beyond chance, or slower beyond the noise of timing, than that
    of the last run of the same recipe in this home, or if it has none. The winner is the same either way."""


def is_import_path(name: str) -> bool:
    """Whether a recipe's value names a Python function, in the form "package.module:function"."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def is_model_name(name: str) -> bool:
    """Whether `[model] architecture` names a model of torchvision or timm, a file, or a Python function."""
    return name.startswith((TORCHVISION, TIMM, FILE)) or is_import_path(name)


def is_weights_file(weights: str) -> bool:
    """Whether `[model] weights` names a file."""
    return weights != "train" and not weights.startswith((TORCHVISION, TIMM))
