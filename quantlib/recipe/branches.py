"""The recipe's branches: each is one way to quantize the model."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from quantlib.recipe.fields import MAX_INT, MAX_ITEMS, BranchName, Count, Flag, Fraction, Line
from quantlib.recipe.schedule import LearningRateDecay
from quantlib.recipe.scheme import PRESETS, ActivationBits, ObserverName, QConfigName, Scheme, WeightGrid
from quantlib.recipe.sections import Section, _BatchOfTwo, _LearningRate, check_scale

_LastEpoch = Annotated[int, Field(ge=-2, le=MAX_INT, strict=True)]


class BranchRecipe(Section):
    """What post-training quantization and quantization-aware training have in common."""

    name: BranchName
    """The variant's name in the report."""
    qconfig: QConfigName = "accurate"
    """`accurate` keeps accuracy best; the others are torch's own: `default` is min/max per tensor, the rest are the
    engines', with weights per channel (qnnpack: per tensor). Each option below overrides one of its settings."""
    observer: ObserverName | None = None
    """How activation ranges are found; absent: as `qconfig` says."""
    weights: WeightGrid | None = None
    """One scale per weight tensor, or one per output channel; absent: as `qconfig` says."""
    activation_bits: ActivationBits | Literal["auto"] | None = None
    """8, or 7 where the CPU's int8 arithmetic would saturate; "auto": what this CPU can; absent: as `qconfig` says."""
    equalize: Flag | None = None
    """Apply cross-layer equalization first; absent: as `qconfig` says."""
    smoothing: Literal[False] | Annotated[float, Field(gt=0.0, le=1.0, strict=True)] | None = None
    """SmoothQuant's alpha, for every tensor that can be rescaled: how much of a channel's range, measured on the
    calibration images, goes over to the weights that read it; false: none; absent: as `qconfig` says."""
    bias_correction: Flag | None = None
    """Correct each layer's mean output, on the calibration images; absent: as `qconfig` says."""
    float_layers: Annotated[tuple[Line, ...], Field(max_length=MAX_ITEMS)] = ()
    """Layers that stay float, by dotted path or class name."""

    @property
    def equalizes(self) -> bool:
        """Whether the float model is equalized first."""
        return PRESETS[self.qconfig].equalize if self.equalize is None else self.equalize

    @property
    def smooths(self) -> float | None:
        """The strength that channels are smoothed with; None: they are not."""
        given = PRESETS[self.qconfig].smoothing if self.smoothing is None else self.smoothing
        return None if given is False else given

    @property
    def corrects_bias(self) -> bool:
        """Whether biases are corrected after calibration."""
        return PRESETS[self.qconfig].bias_correction if self.bias_correction is None else self.bias_correction

    def scheme(self, cpu_bits: ActivationBits) -> Scheme:
        """How the model is quantized.

        Args:
            cpu_bits: What "auto" stands for.
        """
        preset = PRESETS[self.qconfig]
        bits = self.activation_bits or preset.activation_bits
        return Scheme(
            observer=self.observer or preset.observer,
            weights=self.weights or preset.weights,
            activation_bits=cpu_bits if bits == "auto" else bits,
            float_layers=self.float_layers,
        )


class PTQRecipe(BranchRecipe):
    """One post-training quantization branch."""


class QATRecipe(BranchRecipe):
    """One quantization-aware training branch."""

    start: Literal["calibrated", "float"] = "calibrated"
    """calibrated: start from the result of PTQ with the same options; float: from the float model, finding ranges while
    training (`observer` and `bias_correction` would then have no effect, and are refused)."""
    epochs: Count = 8
    """Each epoch is a cached stage, evaluated as an int8 model; the best is kept, or the start if none is better."""
    patience: Count | None = None
    """Stop after this many epochs without a new best (the start counts as a best); absent: train all."""
    batches_per_epoch: Count | None = None
    """Training batches per epoch; absent: the whole training split."""
    batch_size: _BatchOfTwo = 30
    """Images per training step (BatchNorm needs at least two)."""
    learning_rate: _LearningRate = 1e-4
    """Initial learning rate of plain SGD."""
    learning_rate_decay: LearningRateDecay = "cosine"
    """cosine: to zero at the last epoch's end; constant: none."""
    distill: Flag = True
    """Learn the float model's answers to each image instead of the labels."""
    train_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    """Like [data] train_scale, for this branch. The closer the crops are to the images that the float model was
    trained on, the less BatchNorm moves."""
    freeze_batch_norm_after_epoch: _LastEpoch = -2
    """BatchNorm statistics are frozen at the end of every epoch (counted from 0) above this one; -2: from the start, as
    so few images give worse statistics than the float model's own."""
    freeze_observer_after_epoch: _LastEpoch = -2
    """Observers are frozen at the end of every epoch (counted from 0) above this one; -2: from the start."""

    @model_validator(mode="after")
    def _starts_with_ranges(self) -> Self:
        if self.start == "float":
            given = [name for name in ("observer", "bias_correction") if getattr(self, name) is not None]
            if given:
                raise ValueError(f'{given[0]} belongs to calibration, which start = "float" skips: remove one of them')
            if self.freeze_observer_after_epoch == -2:
                raise ValueError(
                    'start = "float" has no ranges yet: set freeze_observer_after_epoch to -1 or more, so '
                    "that training can find them"
                )
        return self

    @field_validator("train_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        return check_scale(scale)
