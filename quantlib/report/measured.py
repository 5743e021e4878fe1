"""What was measured of a variant, and the rows that follow from it without a verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlib.measure.predictions import Predictions
from quantlib.measure.ranking import SETTING
from quantlib.recipe.variant import Variant
from quantlib.report.rows import EpochRow, LatencyRow


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Measurements of an epoch of quantization-aware training."""

    metrics: Mapping[str, Any]
    """`quantlib.quantize.qat.EpochMetrics` as JSON."""
    validation: Predictions
    selection: Predictions
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a variant, in the fastest of the runtimes that the recipe allows."""

    path: str
    sha256: str
    size_bytes: int
    runtime: str
    validation: Predictions
    """Its answers in that runtime; for float, those in the first."""
    selection: Predictions
    out_of: int | None = None
    """How many validation images there are, if evaluation ended once the verdict was certain; None: it saw them all."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a variant."""

    variant: Variant
    int8_share: float | None = None
    """Fraction of the multiply-adds that are int8; None: float."""
    files: Sequence[File]
    """Those that the recipe allows to ship; the one it was judged by if it allows none."""
    available: bool = True
    """Whether it allows any."""
    layers: Sequence[Sequence[Mapping[str, Any]]] = ()
    """`quantlib.measure.sensitivity.LayerSums` of every layer as JSON, per part of the images; empty: not requested."""
    simulated: Mapping[str, Predictions]
    """By what was fake-quantized: both, weights, activations; empty if that was not requested."""
    epochs: tuple[Epoch, ...]
    start_validation: Predictions | None = None
    """Answers of the int8 model that QAT started from, if it did."""
    kept_start: bool | None = None
    """Whether this is that model, because no epoch was better."""
    samples_ms: Mapping[tuple[str, int, int], Sequence[float]]
    """By (runtime, batch size, threads); those of one setting were taken in the same rounds, over all variants."""
    torchscript_path: str | None
    torchscript_refusal: str | None = None
    onnx_paths: Sequence[str] = ()
    """One for every runtime, or one for each."""
    onnx_refusal: str | None = None
    other_refusal: str | None = None

    @property
    def latencies_ms(self) -> dict[str, float]:
        """Median milliseconds of each runtime for one image on one thread."""
        return {
            runtime: float(np.median(samples))
            for (runtime, *setting), samples in self.samples_ms.items()
            if tuple(setting) == SETTING
        }

    @property
    def fastest_onnx(self) -> File | None:
        """The fastest ONNX file of those that may be shipped."""
        by_runtime = self.latencies_ms
        found = [file for file in self.files if file.path in self.onnx_paths]
        return min(found, key=lambda file: by_runtime[file.runtime], default=None)


def epoch_rows(variants: Sequence[Measured]) -> tuple[EpochRow, ...]:
    """A row for each epoch of each variant."""
    return tuple(
        EpochRow(
            variant=measured.variant.name,
            epoch=epoch.metrics["epoch"],
            loss=epoch.metrics["loss"],
            train_top1=epoch.metrics["train_top1"],
            top1=epoch.validation.top1,
            top1_selection=epoch.selection.top1,
            best=epoch.chosen,
            observers_frozen=epoch.metrics["observers_frozen"],
            batch_norm_frozen=epoch.metrics["batch_norm_frozen"],
        )
        for measured in variants
        for epoch in measured.epochs
    )


def latency_rows(variants: Sequence[Measured]) -> tuple[LatencyRow, ...]:
    """A row for each variant, batch size and number of threads."""
    return tuple(
        LatencyRow(
            variant=measured.variant.name,
            runtime=runtime,
            batch_size=batch_size,
            num_threads=num_threads,
            p50_ms=float(np.percentile(samples, 50)),
            p95_ms=float(np.percentile(samples, 95)),
            images_per_second=batch_size / float(np.percentile(samples, 50)) * 1000,
            num_samples=len(samples),
            samples_ms=list(samples),
        )
        for measured in variants
        for (runtime, batch_size, num_threads), samples in measured.samples_ms.items()
    )
