"""The documents of a run's files: what each file says about itself."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlib.export.bundle import SCHEMA_VERSION, Accuracy, FileInfo, Measured, ModelInfo, Preprocessing
from quantlib.measure import significance
from quantlib.recipe.interface import FLOAT
from quantlib.recipe.schema import Recipe
from quantlib.recipe.sections import FILE, is_weights_file
from quantlib.report.rows import FileRow, VariantRow
from quantlib.report.verdict import Verdict
from quantlib.runtimes.available import Runtime


@dataclass(frozen=True, kw_only=True)
class Documents:
    """What the documents of a run's files have in common."""

    run_id: str
    recipe: Recipe
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    judged: Verdict
    rows: tuple[VariantRow, ...]
    """The rows of the variants, float's first."""

    def describe(self, row: VariantRow, path: Path, sha256: str, runtime: Runtime) -> ModelInfo:
        """The document of one file.

        Args:
            row: The row of its variant.
            path: Where it is written.
            sha256: The hash of its model.
            runtime: The runtime that it is meant for.
        """
        interface = self.recipe.export.interface
        found, baseline = self.judged.row_of(str(path)), self.rows[0]
        file = FileInfo(
            name=path.name,
            runtime=runtime.name,
            runtime_version=runtime.version,
            weights_sha256=sha256,
            verdict=_verdict(row, found),
            measured=None if found is None else _measured(found),
        )
        return ModelInfo(
            schema_version=1 if interface == FLOAT else SCHEMA_VERSION,
            run_id=self.run_id,
            variant=row.variant,
            method=row.method,
            recipe=without_places(self.recipe),
            classes=list(self.classes),
            input_size=self.preprocessing.input_size,
            interface=interface,
            preprocessing=self.preprocessing,
            float_accuracy=_accuracy(baseline.top1, baseline.num_images),
            files=[file],
            cpu_model=row.cpu_model,
            torch_version=row.torch_version,
            quantflow_version=importlib.metadata.version("quantflow"),
        )


def _verdict(row: VariantRow, found: FileRow | None) -> str:
    if row.method == "float":
        return "baseline"
    if found is None:
        return "unavailable"
    if row.winner and found.reported:
        return "winner"
    return "accepted" if found.gate == "inside" else found.gate


def _measured(found: FileRow) -> Measured:
    assert found.num_images is not None  # Only in older reports.
    return Measured(
        accuracy=_accuracy(found.top1, found.num_images),
        top1_drop=found.top1_drop,
        top1_drop_low=found.top1_drop_low,
        top1_drop_high=found.top1_drop_high,
        latency_p50_ms=found.latency_p50_ms,
    )


def _accuracy(top1: float, num_images: int) -> Accuracy:
    low, high = significance.proportion_interval(round(top1 * num_images), num_images)
    return Accuracy(top1=top1, top1_low=low, top1_high=high, num_images=num_images)


def without_places(recipe: Recipe) -> dict[str, Any]:
    """The recipe's tables without defaults, and without what a path says about the machine."""
    tables = recipe.model_dump(mode="json", exclude_defaults=True)
    model = recipe.model
    if model.weights is not None and is_weights_file(model.weights):
        tables["model"]["weights"] = Path(model.weights).name
    if model.architecture.startswith(FILE):
        tables["model"]["architecture"] = FILE + Path(model.architecture.removeprefix(FILE)).name
    if recipe.data.root is not None:
        tables["data"]["root"] = Path(recipe.data.root).name
    return tables
