"""What a run is: the recipe, checked once."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantlib.errors import RecipeError, suggest
from quantlib.fields import (
    LINE,
    MAX_INT,
    MAX_ITEMS,
    Arguments,
    BranchName,
    Count,
    Flag,
    Fraction,
    Line,
    PathName,
    Pixels,
)
from quantlib.schedule import LearningRateDecay
from quantlib.scheme import BUNDLES, ActivationBits, ObserverName, QConfigName, Scheme, WeightGrid

EngineName = Literal["auto", "x86", "fbgemm", "onednn", "qnnpack"]
RuntimeName = Literal["torchscript", "onnxruntime", "openvino"]
_BatchOfTwo = Annotated[int, Field(gt=1, le=MAX_INT, strict=True)]
_LearningRate = Annotated[float, Field(gt=0.0, le=1000.0, strict=True)]
_LastEpoch = Annotated[int, Field(ge=-2, le=MAX_INT, strict=True)]
_Runtimes = Annotated[tuple[RuntimeName, ...], Field(max_length=16)]
_MAX_BRANCHES = 1000
_MAX_TOLD = 100


class Section(BaseModel):
    """A frozen table of the recipe; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    """The least and the most of an image that a random crop takes, as they are.

    Raises:
        ValueError: If they are out of order.
    """
    if not 0.0 < scale[0] <= scale[1]:
        raise ValueError("must be [least, most] with 0 < least <= most <= 1")
    return scale


class TrainingRecipe(Section):
    """How to train the float model from nothing, when `weights = "train"`."""

    epochs: Count = 12
    """Passes over the training split."""
    batch_size: _BatchOfTwo = 64
    """Images a step."""
    learning_rate: _LearningRate = 0.05
    """Peak learning rate of SGD with Nesterov momentum 0.9 and a one-cycle schedule."""


class ModelRecipe(Section):
    """The float model: its architecture and where its weights come from."""

    architecture: Line = "mobilenet_v2"
    """A registered name, or "package.module:function", which returns an nn.Module."""
    arguments: Arguments = {}
    """Keyword arguments of the architecture; `num_classes` is taken from the data where it is not given."""
    weights: PathName
    """A state_dict file; "torchvision:NAME"; or "train"."""
    training: TrainingRecipe = TrainingRecipe()
    """Used when `weights = "train"`."""


class DataRecipe(Section):
    """The images, and how they become the model's input."""

    format: Line
    """digits, imagefolder, imagenet, cifar10, or "package.module:function" called as f(root, split)."""
    root: PathName | None = None
    """The dataset's folder; relative to the recipe's file."""
    resize: Pixels = 256
    """Shorter side in pixels before the centre crop (evaluation)."""
    crop: Pixels = 224
    """Side in pixels of the model's input."""
    train_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Share of the image's area that a random training crop takes: least and most."""
    train_flip: Fraction = 0.5
    """Probability that a training image is mirrored."""

    @field_validator("train_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        return check_scale(scale)

    @model_validator(mode="after")
    def _crop_inside_resize(self) -> Self:
        if self.crop > self.resize:
            raise ValueError(f"crop = {self.crop} does not fit into resize = {self.resize}; lower crop")
        return self


class EvaluationRecipe(Section):
    """How accuracy is measured, and which images the run may choose by."""

    batch_size: Count = 50
    """Images a forward pass."""
    max_images: Count | None = None
    """Evaluate only so many validation images, drawn by `seed`; absent: all of them."""
    select_on: Literal["held_back", "validation"] = "held_back"
    """What QAT's best epoch and the winner are chosen by: training images held back from calibration and
    training, or the validation split itself (then its figures are optimistic, and the report says so)."""
    num_held_back: Count | None = None
    """Training images held back, with `select_on = "held_back"`; absent: a tenth of them, and 1000 at most."""
    simulate: Flag = False
    """Also measure every quantized model with fake quantization in float: both, weights only, activations only. Shows
    which of the two costs accuracy. Weights only: as they ship, with the biases that were corrected for them.
    Activations only: with float's weights and biases; of QAT, with those that were trained."""
    num_examples: Annotated[int, Field(ge=0, le=10_000, strict=True)] = 12
    """Validation images kept as small pictures in the report, for each variant: of those that it answers otherwise
    than float. 0: none."""
    layers: Flag = False
    """Also measure every layer of every quantized model (the table `layers`), on 256 of the images that choices are
    made by: two forward passes for each layer."""


class CalibrationRecipe(Section):
    """The training images that activation ranges are taken from."""

    batch_size: Count = 30
    """Images a forward pass."""
    num_batches: Count = 32
    """Batches; the images come from the training split, never from validation."""
    transform: Literal["eval", "train"] = "eval"
    """"eval": resize and centre crop; "train": random crops and flips."""


class BranchRecipe(Section):
    """What post-training quantization and quantization-aware training have in common."""

    name: BranchName
    """The variant's name in the report."""
    qconfig: QConfigName = "accurate"
    """`accurate` is what keeps accuracy best; the others are torch's own: `default` is min/max per tensor, the rest
    the engines', weights per channel (qnnpack: per tensor). Each option below takes the place of one of these."""
    observer: ObserverName | None = None
    """How activation ranges are found; absent: as `qconfig` says."""
    weights: WeightGrid | None = None
    """One scale a weight tensor, or one an output channel; absent: as `qconfig` says."""
    activation_bits: ActivationBits | Literal["auto"] | None = None
    """8, or 7 where the CPU's int8 arithmetic would saturate; "auto": what this CPU can; absent: as `qconfig` says."""
    equalize: Flag | None = None
    """Cross-layer equalization first; absent: as `qconfig` says."""
    bias_correction: Flag | None = None
    """Correct each layer's mean output, on the calibration images; absent: as `qconfig` says."""
    float_layers: Annotated[tuple[Line, ...], Field(max_length=MAX_ITEMS)] = ()
    """Layers that stay float, by dotted path or by class."""

    @property
    def equalizes(self) -> bool:
        """Whether the float model is equalized first."""
        return BUNDLES[self.qconfig].equalize if self.equalize is None else self.equalize

    @property
    def corrects_bias(self) -> bool:
        """Whether biases are corrected after calibration."""
        return BUNDLES[self.qconfig].bias_correction if self.bias_correction is None else self.bias_correction

    def scheme(self, cpu_bits: ActivationBits) -> Scheme:
        """What is put into the model.

        Args:
            cpu_bits: What "auto" stands for.
        """
        bundle = BUNDLES[self.qconfig]
        bits = self.activation_bits or bundle.activation_bits
        return Scheme(
            observer=self.observer or bundle.observer,
            weights=self.weights or bundle.weights,
            activation_bits=cpu_bits if bits == "auto" else bits,
            float_layers=self.float_layers,
        )


class PTQRecipe(BranchRecipe):
    """One post-training quantization branch."""


class QATRecipe(BranchRecipe):
    """One quantization-aware training branch."""

    start: Literal["calibrated", "float"] = "calibrated"
    """calibrated: from what PTQ with the same options gives; float: from the float model, its ranges still to be
    found while training (`observer` and `bias_correction` then have no effect, and are refused)."""
    epochs: Count = 8
    """Each epoch is a cached stage, evaluated as an int8 model; the best is kept, or the start where none is better."""
    patience: Count | None = None
    """Stop after so many epochs without a new best (the start counts as one); absent: train all."""
    batches_per_epoch: Count | None = None
    """Training batches an epoch; absent: the whole training split."""
    batch_size: _BatchOfTwo = 30
    """Images a training step (BatchNorm needs two at least)."""
    learning_rate: _LearningRate = 1e-4
    """Of plain SGD, at the start."""
    learning_rate_decay: LearningRateDecay = "cosine"
    """cosine: to zero at the last epoch's end; constant: none."""
    distill: Flag = True
    """Learn what the float model says of each image, not the labels."""
    train_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    """As [data] train_scale, of this branch. The nearer to the images that the float model was trained on, the less
    BatchNorm moves."""
    freeze_batch_norm_after_epoch: _LastEpoch = -2
    """BatchNorm statistics are frozen at the end of each 0-based epoch whose number is greater than this; -2: from the
    start, as so few images are worse statistics than what the float model brings."""
    freeze_observer_after_epoch: _LastEpoch = -2
    """Observers are frozen at the end of each 0-based epoch whose number is greater than this; -2: from the start."""

    @model_validator(mode="after")
    def _starts_with_ranges(self) -> Self:
        if self.start == "float":
            given = [name for name in ("observer", "bias_correction") if getattr(self, name) is not None]
            if given:
                raise ValueError(f'{given[0]} is of calibration, and start = "float" skips it: remove one of them')
            if self.freeze_observer_after_epoch == -2:
                raise ValueError(
                    'start = "float" has no ranges yet: set freeze_observer_after_epoch to the epoch that ends '
                    "their search"
                )
        return self

    @field_validator("train_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        return check_scale(scale)


class BenchmarkRecipe(Section):
    """What is timed: every batch size with every number of threads."""

    batch_sizes: Annotated[tuple[Count, ...], Field(max_length=64)] = (1,)
    """Images a call; 1 is always timed, as the report's `latency_p50_ms`."""
    num_threads: Annotated[tuple[Annotated[int, Field(gt=0, le=1024, strict=True)], ...], Field(max_length=64)] = (1,)
    """Threads of torch; 1 is always timed."""
    runtimes: _Runtimes | None = None
    """What models are exported for and timed in: torchscript, on each of torch's engines, is always among them;
    absent: and every runtime for ONNX that is installed."""
    num_samples: Annotated[int, Field(ge=10, le=1_000_000, strict=True)] = 50
    """Timed calls of each model in each runtime, in turn, after a warm-up; ten at least, of slow ones no more."""


class SearchRecipe(Section):
    """Variants that are found by trial: the fastest that loses no more than a budget; `quantlib.search` says how."""

    max_top1_drop: Fraction = 0.002
    """The budget: what may be lost of top-1 against float, as a fraction. It is the gate's, too: given in [gate], it
    may be absent here. Trials are judged on the images that choices are made by, the winner by the gate."""
    max_trials: Annotated[int, Field(gt=0, le=_MAX_BRANCHES, strict=True)] = 12
    """Variants to try at most; each is a branch of the report."""
    max_minutes: Annotated[float, Field(gt=0.0, le=1_000_000.0, strict=True)] = 120.0
    """No trial begins once the search's stages took so many minutes; one that has begun goes to its end. A stage that
    is reused counts as long as it took to compute, so that a search that is resumed or repeated ends where it would
    have ended at once."""


class GateRecipe(Section):
    """What the winner may lose."""

    max_top1_drop: Fraction = 0.01
    """Largest accepted loss of top-1 against float, as a fraction: 0.01 is one point. With a [search]: its budget."""
    confidence: Annotated[float, Field(gt=0.0, lt=1.0, strict=True)] | None = None
    """How sure the gate must be: it then accepts a variant only where the whole interval of this confidence around
    its drop is inside; absent: the drop itself is what counts."""
    runtimes: _Runtimes | None = None
    """What the model may be shipped for: a file is judged, and recommended, in one of these; absent: in any that
    `benchmark.runtimes` times."""

    @field_validator("runtimes")
    @classmethod
    def _one_at_least(cls, runtimes: tuple[RuntimeName, ...] | None) -> tuple[RuntimeName, ...] | None:
        if runtimes == ():
            raise ValueError("name one runtime at least, or leave it out")
        return runtimes


class Recipe(Section):
    """A run: one float model, one dataset, and the variants to try."""

    name: BranchName
    """Names the run in reports and on the dashboard."""
    description: Line = ""
    """One line for `quantflow recipes`."""
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 191009
    """Of every random choice: initial weights, data order, crops."""
    engine: EngineName = "auto"
    """torch's int8 engine; auto: x86 on x86-64 CPUs, else qnnpack."""
    model: ModelRecipe
    """The float model."""
    data: DataRecipe
    """The images."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """How accuracy is measured."""
    calibration: CalibrationRecipe = CalibrationRecipe()
    """Where activation ranges come from."""
    ptq: Annotated[tuple[PTQRecipe, ...], Field(max_length=_MAX_BRANCHES)] = ()
    """Post-training quantization branches."""
    qat: Annotated[tuple[QATRecipe, ...], Field(max_length=_MAX_BRANCHES)] = ()
    """Quantization-aware training branches."""
    search: SearchRecipe | None = None
    """Variants found by trial, besides these branches or alone; absent: none."""
    benchmark: BenchmarkRecipe = BenchmarkRecipe()
    """What is timed."""
    gate: GateRecipe = GateRecipe()
    """What the winner may lose."""

    @model_validator(mode="before")
    @classmethod
    def _share_budget(cls, tables: Any) -> Any:
        """Of [search] and [gate], the one that has no budget takes the other's."""
        search = tables.get("search") if isinstance(tables, Mapping) else None
        gate = tables.get("gate", {}) if isinstance(tables, Mapping) else None
        if not isinstance(search, Mapping) or not isinstance(gate, Mapping):
            return tables
        budget = {"max_top1_drop": SearchRecipe.model_fields["max_top1_drop"].default}
        budget |= {name: value for table in (gate, search) for name, value in table.items() if name in budget}
        return {**tables, "search": budget | dict(search), "gate": budget | dict(gate)}

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        # Were the gate's wider, the fastest trial inside of it would win: one that the search was to do better than.
        if self.search is not None and self.search.max_top1_drop != self.gate.max_top1_drop:
            raise ValueError(
                f"search.max_top1_drop = {self.search.max_top1_drop} and gate.max_top1_drop = "
                f"{self.gate.max_top1_drop} are one budget: remove one of them, or give both the same value"
            )
        return self

    @model_validator(mode="after")
    def _gate_is_timed(self) -> Self:
        timed = self.benchmark.runtimes
        untimed = [
            name for name in self.gate.runtimes or () if timed is not None and name not in {"torchscript", *timed}
        ]
        if untimed:
            raise ValueError(
                f"gate.runtimes names {untimed[0]}, which benchmark.runtimes leaves out: add it there, or remove it "
                "here"
            )
        return self

    @model_validator(mode="after")
    def _branches(self) -> Self:
        names = [branch.name for branch in self.ptq] + [branch.name for branch in self.qat]
        if not names and self.search is None:
            raise ValueError("there is nothing to quantize: add a [[ptq]] or a [[qat]] branch, or [search]")
        if self.search is not None and any(name.startswith("search-") for name in names):
            raise ValueError("names that begin with 'search-' are those of the search's trials: take another")
        repeated = sorted({name for name in names if names.count(name) > 1} | ({"float"} & set(names)))
        if repeated:
            raise ValueError(
                f"branch name {repeated[0]!r} is taken: each [[ptq]] and [[qat]] needs a name of its own, "
                "and 'float' is the baseline's"
            )
        return self


def parse_recipe(tables: Mapping[str, Any]) -> Recipe:
    """Check the tables of a recipe.

    Raises:
        RecipeError: With one line for each key or value that is not allowed.
    """
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(details) for details in error.errors())) from None


def is_import_path(name: str) -> bool:
    """Whether a recipe's value names a Python function, as "package.module:function"."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def is_weights_file(weights: str) -> bool:
    """Whether `[model] weights` names a file."""
    return weights != "train" and not weights.startswith("torchvision:")


def _explain(details: Any) -> str:
    """One line for a pydantic error: where, what was got, what is allowed."""
    where = ".".join(str(part) for part in details["loc"]) or "recipe"
    if details["type"] == "extra_forbidden":
        allowed = _fields_at(details["loc"][:-1])
        return f"Unknown key {where!r}{suggest(str(details['loc'][-1]), allowed)} Allowed here: {', '.join(allowed)}."
    if details["type"] == "missing":
        return f"Missing key {where!r}: the recipe must set it."
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "literal_error":
        got = details["input"]
        allowed = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        return f"{where} = {got!r} is unknown{suggest(str(got), allowed)} Allowed: {', '.join(allowed)}."
    if details["type"] == "string_unicode" or details.get("ctx", {}).get("pattern") == LINE:
        message = "a line of text has no line breaks, control characters or half characters"
    if details["type"] == "value_error" and not isinstance(details["input"], (str, int, float, list, tuple)):
        return f"{where}: {message}."
    got = repr(details["input"])
    got = got if len(got) <= _MAX_TOLD else f"{got[:_MAX_TOLD]}… ({len(got)} characters)"
    return f"{where} = {got} is not allowed: {message}."


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """The keys that the table at `location` may have."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next((a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)), annotation)
    return list(section.model_fields)
