"""The rows of the table `layers`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """A layer of a quantized model, measured in float with fake quantization on some of the images."""

    variant: str
    """The branch's name."""
    layer: str
    """Its dotted path in the fused model."""
    type: str
    """Its class, such as ConvReLU2d."""
    weight_min: float | None
    """Smallest value of the float weight, BatchNorm folded in; null if it has none."""
    weight_max: float | None
    """Largest value of the float weight; null if it has none."""
    activation_min: float | None
    """Ends of its output's int8 grid; null if its output is not quantized."""
    activation_max: float | None
    """See `activation_min`."""
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of its output where every layer is int8, against float."""
    saturation: float | None
    """Fraction of its output's values that the grid cuts off."""
    top1_float: float | None = None
    """On these images: a reference for the figures below."""
    top1_int8: float | None = None
    """When every layer is int8."""
    top1_only: float
    """When only this layer is int8."""
    top1_all_but: float
    """When every layer but this one is int8."""
    divergence_only: float
    """Mean Kullback-Leibler divergence of its answers from float's, when only this layer is int8; nats."""
    num_images: int
    """Images that these figures were measured on."""
    measured_on: str
    """Where these images come from: held_out (training images) or validation, like the selection images."""
