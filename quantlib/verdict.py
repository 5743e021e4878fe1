"""The verdict: what was measured of each variant, the rows that say so, and which variant is to be shipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np

from quantlib import machine, significance
from quantlib.predictions import Predictions
from quantlib.recipe import GateRecipe
from quantlib.report import EpochRow, LatencyRow, VariantRow
from quantlib.scheme import Scheme

# Timings of one model differ by about this much from run to run; variants closer than that are equally fast.
EQUALLY_FAST = 1.10


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What was measured of an epoch of quantization-aware training."""

    metrics: Mapping[str, Any]
    """`quantlib.qat.EpochMetrics` as JSON."""
    validation: Predictions
    selection: Predictions
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Onnx:
    """What became of a variant as ONNX: the file and its answers, or why there is none."""

    path: str | None = None
    validation: Predictions | None = None
    refusal: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a variant."""

    name: str
    method: str
    qconfig: str | None
    engine: str | None
    scheme: Scheme | None = None
    """None: float."""
    equalized: bool = False
    bias_corrected: bool = False
    validation: Predictions
    selection: Predictions
    layers: Sequence[Sequence[Mapping[str, Any]]] = ()
    """`quantlib.layers.LayerSums` of every layer as JSON, for each part of the images; empty where not asked for."""
    simulated: Mapping[str, Predictions]
    """By what was fake-quantized: both, weights, activations; empty where that was not asked for."""
    epochs: tuple[Epoch, ...]
    start_validation: Predictions | None = None
    """Of the int8 model that QAT started from, where it started from one."""
    kept_start: bool | None = None
    """Whether that is what this is, as no epoch was better."""
    samples_ms: Mapping[tuple[str, int, int], Sequence[float]]
    """By (runtime, batch size, threads)."""
    onnx: Onnx | None = None
    artifact_sha256: str
    artifact_path: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the rows of a run have in common."""

    recipe: str
    selected_on: str
    torch_version: str
    cpu_model: str
    created_at: datetime


def variant_rows(
    variants: Sequence[Measured], gate: GateRecipe, circumstances: Circumstances
) -> tuple[VariantRow, ...]:
    """A row for each variant, the winner marked.

    Args:
        variants: The float model first.
        gate: What a variant may lose.
        circumstances: Repeated in each row.
    """
    baseline = variants[0]
    rows = [_variant_row(variant, baseline, gate, circumstances) for variant in variants]
    winner = choose_winner(rows)
    return tuple(replace(row, winner=row.variant == winner) for row in rows)


def choose_winner(variants: Sequence[VariantRow]) -> str | None:
    """The name of the variant to ship: of the quantized ones inside the gate, a fastest.

    Those that are equally fast are ranked by accuracy on the images that choices are made by, then by size, then
    by their order in the recipe.

    Returns:
        None where no quantized variant is inside the gate.
    """
    accepted = [row for row in variants if row.accepted and row.method != "float"]
    if not accepted:
        return None
    fastest = min(row.latency_p50_ms for row in accepted)
    near = [row for row in accepted if row.latency_p50_ms <= fastest * EQUALLY_FAST]
    return max(near, key=lambda row: (row.top1_selection, -row.size_bytes)).variant


def epoch_rows(variants: Sequence[Measured]) -> tuple[EpochRow, ...]:
    """A row for each epoch of each variant."""
    return tuple(
        EpochRow(
            variant=variant.name,
            epoch=epoch.metrics["epoch"],
            loss=epoch.metrics["loss"],
            train_top1=epoch.metrics["train_top1"],
            top1=epoch.validation.top1,
            top1_selection=epoch.selection.top1,
            best=epoch.chosen,
            observers_frozen=epoch.metrics["observers_frozen"],
            batch_norm_frozen=epoch.metrics["batch_norm_frozen"],
        )
        for variant in variants
        for epoch in variant.epochs
    )


def latency_rows(variants: Sequence[Measured]) -> tuple[LatencyRow, ...]:
    """A row for each variant, batch size and number of threads."""
    return tuple(
        LatencyRow(
            variant=variant.name,
            runtime=runtime,
            batch_size=batch_size,
            num_threads=num_threads,
            p50_ms=float(np.percentile(samples, 50)),
            p95_ms=float(np.percentile(samples, 95)),
            images_per_second=batch_size / float(np.percentile(samples, 50)) * 1000,
            num_samples=len(samples),
        )
        for variant in variants
        for (runtime, batch_size, num_threads), samples in variant.samples_ms.items()
    )


def _variant_row(variant: Measured, baseline: Measured, gate: GateRecipe, circumstances: Circumstances) -> VariantRow:
    drop = baseline.validation.top1 - variant.validation.top1
    paired = _paired(baseline, variant, 0.95)
    outcome, num_to_decide = _judge(baseline, variant, gate)
    by_runtime = _latencies(variant)
    latency = by_runtime[machine.torchscript_on(variant.engine)]
    fastest = min(by_runtime, key=lambda runtime: by_runtime[runtime])
    simulated = {parts: predictions.top1 for parts, predictions in variant.simulated.items()}
    return VariantRow(
        recipe=circumstances.recipe,
        variant=variant.name,
        method=variant.method,
        qconfig=variant.qconfig,
        engine=variant.engine,
        observer=variant.scheme.observer if variant.scheme else None,
        weights=variant.scheme.weights if variant.scheme else None,
        activation_bits=variant.scheme.activation_bits if variant.scheme else None,
        float_layers=list(variant.scheme.float_layers) if variant.scheme else None,
        equalized=variant.equalized,
        bias_corrected=variant.bias_corrected,
        top1=variant.validation.top1,
        top5=variant.validation.top5_accuracy,
        loss=variant.validation.mean_loss,
        num_images=len(variant.validation),
        top1_drop=drop,
        top1_drop_low=paired.low,
        top1_drop_high=paired.high,
        p_value=paired.p_value,
        top1_selection=variant.selection.top1,
        selected_on=circumstances.selected_on,
        top1_simulated=simulated.get("both"),
        top1_weights_only=simulated.get("weights"),
        top1_activations_only=simulated.get("activations"),
        best_epoch=next((epoch.metrics["epoch"] for epoch in variant.epochs if epoch.chosen), None),
        top1_start=variant.start_validation.top1 if variant.start_validation else None,
        kept_start=variant.kept_start,
        size_bytes=variant.size_bytes,
        latency_p50_ms=latency,
        speedup=_latencies(baseline)[machine.torchscript_on(baseline.engine)] / latency,
        fastest_runtime=fastest,
        fastest_p50_ms=by_runtime[fastest],
        accepted=outcome == "inside",
        gate=outcome,
        num_images_to_decide=num_to_decide,
        winner=False,
        artifact_sha256=variant.artifact_sha256,
        artifact_path=variant.artifact_path,
        onnx_path=variant.onnx.path if variant.onnx else None,
        onnx_top1=variant.onnx.validation.top1 if variant.onnx and variant.onnx.validation else None,
        onnx_refusal=variant.onnx.refusal if variant.onnx else None,
        torch_version=circumstances.torch_version,
        cpu_model=circumstances.cpu_model,
        created_at=circumstances.created_at,
    )


def _latencies(variant: Measured) -> dict[str, float]:
    """Median milliseconds of each runtime for one image on one thread."""
    return {
        runtime: float(np.percentile(samples, 50))
        for (runtime, batch_size, num_threads), samples in variant.samples_ms.items()
        if (batch_size, num_threads) == (1, 1)
    }


def _paired(baseline: Measured, variant: Measured, confidence: float) -> significance.PairedDrop:
    return significance.paired_drop(baseline.validation.top1_correct, variant.validation.top1_correct, confidence)


def _judge(baseline: Measured, variant: Measured, gate: GateRecipe) -> tuple[str, int | None]:
    """Whether a variant is inside the gate, outside, or undecided; then, how many images would tell."""
    num_images = len(variant.validation)
    # A drop of exactly the gate is not to be lost to float64's rounding; one image is far more than this.
    limit = gate.max_top1_drop + 1e-9
    paired = _paired(baseline, variant, gate.confidence or 0.95)
    if variant is baseline:
        return "inside", None
    if gate.confidence is None:
        return ("inside" if paired.drop <= limit else "outside"), None
    if paired.high <= limit:
        return "inside", None
    if paired.low > limit:
        return "outside", None
    return "undecided", significance.images_to_tell(paired, num_images, limit)
