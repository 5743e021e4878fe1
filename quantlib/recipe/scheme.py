"""How a model is quantized: which ranges, which grids, which layers."""

from dataclasses import dataclass
from typing import Literal, get_args

ObserverName = Literal["minmax", "moving_average", "histogram", "percentile", "mse"]
WeightGrid = Literal["per_tensor", "per_channel"]
ActivationBits = Literal[7, 8]
FuseMode = Literal["eval", "qat"]
QConfigName = Literal["accurate", "default", "fbgemm", "x86", "onednn", "qnnpack"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What `preparation.prepare` puts into a model."""

    observer: ObserverName
    """How activation ranges are found."""
    weights: WeightGrid
    """One scale per weight tensor, or one per output channel."""
    activation_bits: ActivationBits
    """7 bits leave room for the 16-bit sums of CPUs without VNNI, on which 8 bits saturate."""
    float_layers: tuple[str, ...] = ()
    """Dotted names or class names of the modules that stay float."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a `qconfig` of the recipe stands for; each option that the recipe gives overrides one of these."""

    observer: ObserverName
    weights: WeightGrid
    activation_bits: ActivationBits | Literal["auto"]
    equalize: bool = False
    smoothing: float | None = None
    bias_correction: bool = False


# torch's own qconfigs, and one that uses everything quantlib offers.
PRESETS: dict[QConfigName, Preset] = {
    "accurate": Preset(
        observer="mse", weights="per_channel", activation_bits="auto", smoothing=0.5, bias_correction=True
    ),
    "default": Preset(observer="minmax", weights="per_tensor", activation_bits=7),
    "fbgemm": Preset(observer="histogram", weights="per_channel", activation_bits=7),
    "x86": Preset(observer="histogram", weights="per_channel", activation_bits=7),
    "onednn": Preset(observer="histogram", weights="per_channel", activation_bits=8),
    "qnnpack": Preset(observer="histogram", weights="per_tensor", activation_bits=8),
}
assert set(PRESETS) == set(get_args(QConfigName))
