"""Finished runs made by hand: a journal, the records of two stages, a report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rows import START, variant_row

from quantlib.measure.predictions import Predictions
from quantlib.recipe.schema import parse_recipe
from quantlib.report import tables
from quantlib.report.results import Report
from quantlib.report.rows import LatencyRow, StageRow, VariantRow
from quantlib.store.artifacts import Record
from quantlib.store.journal import Journal
from quantlib.store.local import Store

FIRST, SECOND, THIRD = (f"2026050{n}-030000-tiny-0000000{n}" for n in (1, 2, 3))
NUM_IMAGES = 100
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {"weights": "train"},
    "data": {"format": "digits"},
    "ptq": [{"name": "small"}],
}
INGREDIENTS = {
    "code.calibrate": "c0",
    "code.quantlib.quantize.ranges": "c1",
    "images.split.name": json.dumps("val"),
    "images.split.fingerprint": json.dumps("f0"),
    "library.torch": "2.15.0",
    "runtime.name": json.dumps("onnxruntime"),
    "runtime.version": json.dumps("1.32.0"),
}


def answers(num_right: int, num_images: int = NUM_IMAGES) -> Predictions:
    """Two classes; the first `num_right` images are answered correctly."""
    labels = np.arange(num_images) % 2
    likeliest = np.where(np.arange(num_images) < num_right, labels, 1 - labels)
    return Predictions(labels, np.stack([likeliest, 1 - likeliest], axis=1), np.zeros(num_images, np.float32))


def latency_row(variant: str, samples_ms: list[float] | None, **changes: Any) -> LatencyRow:
    """One image on one thread in ONNX Runtime."""
    values: dict[str, Any] = {
        "variant": variant,
        "runtime": "onnxruntime",
        "batch_size": 1,
        "num_threads": 1,
        "p50_ms": 1.0,
        "p95_ms": 1.0,
        "images_per_second": 1000.0,
        "num_samples": 50,
        "samples_ms": samples_ms,
    }
    return LatencyRow(**values | changes)


def times(milliseconds: float, seed: int = 0) -> list[float]:
    """50 timings with noise of one per cent."""
    return list(milliseconds * (1 + 0.01 * np.random.default_rng(seed).standard_normal(50)))


def report(run_id: str, *, num_right: int = 90, milliseconds: float = 1.0, float_ms: float = 4.0, **row: Any) -> Report:
    """A report whose winner is `small`, right on `num_right` of 100 images."""
    common = {"num_images": NUM_IMAGES, "runtime": "onnxruntime"}
    rows: tuple[VariantRow, ...] = (
        variant_row("float", method="float", top1=0.92, latency_p50_ms=float_ms, **common | {"cpu_model": "A CPU"}),
        variant_row(
            "small", **common | {"top1": num_right / 100, "latency_p50_ms": milliseconds, "winner": True} | row
        ),
    )
    seed = int(run_id[-1])
    return Report(
        run_id=run_id,
        variants=rows,
        epochs=(),
        latency=(
            latency_row("float", times(float_ms, seed)),
            latency_row("small", times(milliseconds, seed + 10)),
        ),
        stages=(StageRow("calibrate-small", f"key of {run_id}", False, 1.0, START),),
    )


def write(
    home: Path,
    found: Report,
    *,
    recipe: dict[str, Any] = RECIPE,
    ingredients: dict[str, str] = INGREDIENTS,
    num_right: int = 90,
    images: list[str] | None = None,
) -> None:
    """Put a finished run into a home."""
    with Journal(home / "runs" / found.run_id).record("quantize", parse_recipe(recipe), None):
        pass
    Store(home / "store").add_record(
        Record(found.stages[0].key, "calibrate", {"stage": "calibrate", **ingredients}, (), 1.0, START.isoformat())
    )
    names = [f"{n}.png" for n in range(NUM_IMAGES)] if images is None else images
    tables.write(
        home / "reports",
        found,
        {"float": answers(92, len(names)), "small": answers(num_right, len(names))},
        names,
    )


def write_run(home: Path, run_id: str, *, num_right: int = 90, images: list[str] | None = None, **options: Any) -> None:
    """Put a finished run into a home: `report` with the options of either."""
    own = {name: options.pop(name) for name in ("recipe", "ingredients") if name in options}
    write(home, report(run_id, num_right=num_right, **options), num_right=num_right, images=images, **own)


def without_samples(found: Report) -> Report:
    """A report as it was written before single times were kept."""
    return replace(found, latency=tuple(replace(row, samples_ms=None) for row in found.latency))
