"""Why a variant loses accuracy: the measurements of its layers, which of them cost most, and what to try."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlib.report.layers import LayerRow
from quantlib.report.results import Report
from quantlib.report.rows import VariantRow

NUM_WORST = 3
# A range that cuts off more than this is too narrow; the best one for rounding and clipping together cuts off a few
# values in ten thousand.
_MUCH_CLIPPED = 1e-3


@dataclass(frozen=True)
class Diagnosis:
    """Why one variant loses accuracy."""

    row: VariantRow
    worst: tuple[LayerRow, ...]
    """The layers that cost most, the costliest first; empty if layers were not measured."""
    advice: tuple[str, ...]
    """What to try, as lines of the recipe; empty if the variant is as accurate as float."""


def layer_rows(variant: str, measured_on: str, parts: Iterable[Sequence[Mapping[str, Any]]]) -> list[LayerRow]:
    """A variant's layer rows, from sums over parts of the images.

    Args:
        variant: Its name.
        measured_on: Where the images come from: held_out or validation.
        parts: `quantlib.measure.sensitivity.LayerSums` of every layer as JSON, for each part of the images.
    """
    return [_layer_row(variant, measured_on, sums) for sums in zip(*parts, strict=True)]


def _layer_row(variant: str, measured_on: str, parts: Sequence[Mapping[str, Any]]) -> LayerRow:
    def total(name: str) -> float:
        return sum(part[name] for part in parts)

    first, num_images = parts[0], int(total("num_images"))
    signal, noise, num_values = total("signal"), total("noise"), total("num_values")
    return LayerRow(
        variant=variant,
        layer=first["layer"],
        type=first["type"],
        weight_min=first["weight_min"],
        weight_max=first["weight_max"],
        activation_min=first["activation_min"],
        activation_max=first["activation_max"],
        # An output without error, or without signal, has no ratio.
        sqnr_db=10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None,
        saturation=total("num_clipped") / num_values if num_values else None,
        top1_float=total("num_correct_float") / num_images,
        top1_int8=total("num_correct_int8") / num_images,
        top1_only=total("num_correct_only") / num_images,
        top1_all_but=total("num_correct_all_but") / num_images,
        divergence_only=total("divergence_only") / num_images,
        num_images=num_images,
        measured_on=measured_on,
    )


def costliest(layers: Iterable[LayerRow]) -> list[LayerRow]:
    """Layers by what each costs alone, the costliest first.

    By divergence from float's answers: it also ranks layers that change the top-1 of no image, or of one by chance.
    """
    return sorted(layers, key=lambda row: row.divergence_only, reverse=True)


def diagnose(report: Report) -> list[Diagnosis]:
    """Diagnose every quantized variant of a run that there are measurements for."""
    found = []
    for row in report.variants:
        worst = tuple(costliest(layer for layer in report.layers if layer.variant == row.variant)[:NUM_WORST])
        if row.method != "float" and (worst or row.top1_simulated is not None):
            found.append(Diagnosis(row, worst, tuple(_advice(row, worst))))
    return found


def _advice(row: VariantRow, worst: Sequence[LayerRow]) -> list[str]:
    """What to change, the cheapest at inference first; at most three lines, and none where nothing was lost."""
    if row.top1_drop <= 0:
        return []
    tries = []
    if not row.equalized and row.weights == "per_tensor":
        tries.append('equalize = true, or weights = "per_channel": channels of uneven range share one scale')
    clipped = any((layer.saturation or 0.0) > _MUCH_CLIPPED for layer in worst)
    if clipped and row.observer == "minmax":
        tries.append("more images in [calibration]: values lie outside the ranges that it saw")
    elif clipped:
        tries.append('observer = "minmax": the ranges cut off too many values')
    elif row.observer == "minmax":
        tries.append('observer = "mse": ranges with the least error')
    if not row.bias_corrected and row.method == "ptq":
        tries.append("bias_correction = true")
    if row.method == "ptq":
        tries.append("a [[qat]] branch with the same options")
    keepable = [layer.layer for layer in worst if layer.weight_min is not None]
    if keepable:
        tries.append(f"float_layers = {keepable}: slower".replace("'", '"'))
    return tries[:3]
