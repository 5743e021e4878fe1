"""Two models compared across runs: is one less accurate or slower than the other, beyond chance and noise?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantlib.measure import significance
from quantlib.measure.ranking import SETTING
from quantlib.report.results import Report
from quantlib.report.rows import VariantRow, points


@dataclass(frozen=True)
class Results:
    """A run's report, and what else two runs are compared by."""

    report: Report
    predictions: pa.Table
    """The table `predictions`."""
    validation: str | None
    """Fingerprint of the validation split; None: unknown."""


@dataclass(frozen=True, kw_only=True)
class ModelChange:
    """From one run's model to another's."""

    before: str
    """The variant's name."""
    after: str
    runtime_before: str | None
    runtime_after: str | None
    top1_before: float
    top1_after: float
    paired: bool
    """Whether both answered the same images; if not, their accuracies are compared as a whole."""
    num_images: int | None
    """How many images both answered; null if unpaired."""
    top1_drop: float
    """The first one's top1 minus the second one's, on these images."""
    top1_drop_low: float
    """Ends of the 95% interval of the drop."""
    top1_drop_high: float
    p_value: float | None
    """Exact McNemar test; null if unpaired."""
    accuracy: Literal["worse", "better", "same"]
    """Beyond chance: by the test or, if unpaired, by the interval; both at the level of 5%."""
    latency_before_ms: float
    latency_after_ms: float
    latency_ratio: float
    """The second one's latency over the first one's."""
    latency_ratio_to_float: float | None
    """The same where each is divided by float's in its own run and round; null if that was not kept."""
    speed: Literal["slower", "faster", "same", "unknown"]
    """Beyond the noise of timing; unknown: on different CPUs, without single times, or float itself."""

    @property
    def accuracy_text(self) -> str:
        """The change in accuracy and how sure it is."""
        interval = f"95% interval {points(-self.top1_drop_high)} to {points(-self.top1_drop_low)}"
        how = "not on the same images"
        if self.p_value is not None:
            how = f"p = {self.p_value:.2g}, on the same {self.num_images:,} images"
        verdict = {"worse": "less accurate", "better": "more accurate", "same": "as accurate, within chance"}
        return f"{points(-self.top1_drop)} points of top-1 ({interval}, {how}): {verdict[self.accuracy]}"

    @property
    def speed_text(self) -> str:
        """The change in latency and whether it is more than noise."""
        relative = self.latency_ratio_to_float
        to_float = "" if relative is None else f" ({relative:.2f}x relative to float)"
        verdict = {
            "same": "as fast, within noise",
            "unknown": "not judged, which takes single times of both models and of float, on one CPU",
        }
        return f"{self.latency_ratio:.2f}x the latency{to_float}: {verdict.get(self.speed, self.speed)}"


def compare_models(before: Results, old: VariantRow, after: Results, new: VariantRow) -> ModelChange:
    """Compare a variant of one run with a variant of another.

    Accuracy is compared as in `significance.is_less_accurate`, if both runs evaluated the same images. Timings of two
    runs were not taken in the same rounds, and a machine may be slower one night. So a model counts as slower only if
    it is slower in milliseconds and also relative to float, which took part in the same rounds, each by
    `significance.is_slower`.
    """
    images, correct = _answers(before.predictions, old.variant)
    other_images, other_correct = _answers(after.predictions, new.variant)
    # Both start with the same images in the same random order where evaluation stopped early.
    both = slice(min(len(images), len(other_images)))
    images, correct, other_images, other_correct = (
        images[both],
        correct[both],
        other_images[both],
        other_correct[both],
    )
    paired = _are_same(images, other_images) and (
        None in {before.validation, after.validation} or before.validation == after.validation
    )
    p_value: float | None = None
    if paired:
        found = significance.paired_drop(correct, other_correct)
        drop, low, high, p_value = found.drop, found.low, found.high, found.p_value
        is_real = p_value < significance.LEVEL
    else:
        low, high = significance.unpaired_interval(old.top1, old.num_images, new.top1, new.num_images)
        drop, is_real = old.top1 - new.top1, not low <= 0 <= high
    speed, relative = _compare_speed(before, old, after, new)
    return ModelChange(
        before=old.variant,
        after=new.variant,
        runtime_before=old.runtime,
        runtime_after=new.runtime,
        top1_before=old.top1,
        top1_after=new.top1,
        paired=paired,
        num_images=len(correct) if paired else None,
        top1_drop=drop,
        top1_drop_low=low,
        top1_drop_high=high,
        p_value=p_value,
        accuracy="same" if not is_real else "worse" if drop > 0 else "better",
        latency_before_ms=old.latency_p50_ms,
        latency_after_ms=new.latency_p50_ms,
        latency_ratio=new.latency_p50_ms / old.latency_p50_ms,
        latency_ratio_to_float=relative,
        speed=speed,
    )


def _answers(predictions: pa.Table, variant: str) -> tuple[pa.Table, np.ndarray]:
    """The images and labels that a variant answered, and [N], bool: whether it was right."""
    rows = predictions.filter(pc.equal(predictions["variant"], variant))
    likeliest = pc.list_element(rows["top5"], 0) if len(rows) else rows["label"]
    return rows.select(["image", "label"]), np.asarray(pc.equal(rows["label"], likeliest), dtype=bool)


def _are_same(images: pa.Table, others: pa.Table) -> bool:
    """Whether two variants answered the same images in the same order; unknown names are not the same."""
    return len(images) > 0 and images["image"].null_count == 0 and bool(images.equals(others))


def _compare_speed(
    before: Results, old: VariantRow, after: Results, new: VariantRow
) -> tuple[Literal["slower", "faster", "same", "unknown"], float | None]:
    """Whether the speed changed beyond noise, and the ratio of latencies relative to float."""
    first, second = _samples(before.report), _samples(after.report)
    runtime = next((name for variant, name in first if variant == "float" and (variant, name) in second), None)
    own, other = first.get((old.variant, old.runtime)), second.get((new.variant, new.runtime))
    if own is None or other is None or runtime is None:
        return "unknown", None
    own_relative = np.divide(own, first["float", runtime])
    other_relative = np.divide(other, second["float", runtime])
    ratio = float(np.median(other_relative) / np.median(own_relative))
    if old.cpu_model != new.cpu_model or "float" in {old.variant, new.variant}:
        return "unknown", ratio
    rounds = slice(min(len(own), len(other)))

    def is_slower(samples: np.ndarray, others: np.ndarray) -> bool:
        return significance.is_slower(samples[rounds].tolist(), others[rounds].tolist())

    if is_slower(other, own) and is_slower(other_relative, own_relative):
        return "slower", ratio
    if is_slower(own, other) and is_slower(own_relative, other_relative):
        return "faster", ratio
    return "same", ratio


def _samples(report: Report) -> Mapping[tuple[str, str | None], np.ndarray]:
    """Times for one image on one thread, by variant and runtime; float's fastest runtime comes first."""
    rows = [row for row in report.latency if (row.batch_size, row.num_threads) == SETTING]
    kept: list[tuple[tuple[str, str], Sequence[float]]] = [
        ((row.variant, row.runtime), row.samples_ms) for row in rows if row.samples_ms
    ]
    return {key: np.asarray(samples) for key, samples in sorted(kept, key=lambda pair: float(np.median(pair[1])))}
