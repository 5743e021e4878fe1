"""The report: eleven Parquet tables, partitioned by run.

`variants` and `stages` are a contract with outside readers: columns are added, never renamed.
"""

import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import pyarrow as pa

from quantlib.errors import StoreError
from quantlib.export.bundle import Preprocessing
from quantlib.measure import examples
from quantlib.measure.predictions import Predictions
from quantlib.report import parquet as tables_on_disk
from quantlib.report.layers import LayerRow
from quantlib.report.results import Report
from quantlib.report.rows import (
    ClassRow,
    EpochRow,
    FileRow,
    LatencyRow,
    NoteRow,
    PredictionRow,
    StageRow,
    VariantRow,
)

Row = TypeVar("Row")

_COLUMN_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
    datetime: pa.timestamp("us", tz="UTC"),
    list[int]: pa.list_(pa.int64()),
    list[float]: pa.list_(pa.float64()),
    list[str]: pa.list_(pa.string()),
}


def _schema_of(row: type) -> pa.Schema:
    """The columns of a row's fields."""
    hints = get_type_hints(row)
    return pa.schema(
        [(name, _COLUMN_TYPES.get(kind) or _COLUMN_TYPES[get_args(kind)[0]]) for name, kind in hints.items()]
    )


ROWS: dict[str, type] = {
    "variants": VariantRow,
    "files": FileRow,
    "notes": NoteRow,
    "epochs": EpochRow,
    "latency": LatencyRow,
    "layers": LayerRow,
    "predictions": PredictionRow,
    "classes": ClassRow,
    "preprocessing": Preprocessing,
    "examples": examples.Example,
    "stages": StageRow,
}
"""What a row of each table is."""

SCHEMAS: dict[str, pa.Schema] = {name: _schema_of(row) for name, row in ROWS.items()}


def write(
    folder: Path, report: Report, predictions: Mapping[str, Predictions], images: Sequence[str] | None = None
) -> None:
    """Write a run's tables as folder/TABLE/run_id=RUN/part-0.parquet, each whole or not at all.

    `variants` comes last: if it is there, so is the rest.

    Args:
        folder: Folder of all runs' reports.
        report: A run that was written before is replaced.
        predictions: Every variant's, on the validation images.
        images: Names of those images; a variant may have answered only the first of them. None: unknown.
    """
    tables = {
        "epochs": _table("epochs", report.epochs),
        "latency": _table("latency", report.latency),
        "layers": _table("layers", report.layers),
        "predictions": predictions_table(predictions, images),
        "classes": _table("classes", report.classes),
        "preprocessing": _table("preprocessing", report.preprocessing),
        "examples": _table("examples", report.examples),
        "stages": _table("stages", report.stages),
        "files": _table("files", report.files),
        "notes": _table("notes", report.notes),
        "variants": _table("variants", report.variants),
    }
    for name, table in tables.items():
        tables_on_disk.write(folder / name / f"run_id={report.run_id}", table)


def predictions_table(predictions: Mapping[str, Predictions], images: Sequence[str] | None) -> pa.Table:
    """The table `predictions`: every variant's answer for every image; see `write`."""
    parts = [
        pa.table(
            {
                "variant": pa.repeat(variant, len(answers)),
                "image_index": np.arange(len(answers)),
                "image": pa.nulls(len(answers), pa.string()) if images is None else pa.array(images[: len(answers)]),
                "label": answers.labels,
                "top5": pa.array(list(answers.top5), pa.list_(pa.int64())),
            },
            schema=SCHEMAS["predictions"],
        )
        for variant, answers in predictions.items()
    ]
    return pa.concat_tables(parts)


def _table(name: str, rows: Iterable[Any]) -> pa.Table:
    """Rows, as dataclasses, in the schema of a table."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMAS[name])


def read_table(
    folder: Path, name: str, run_id: str | None = None, damaged: Callable[[StoreError], None] | None = None
) -> pa.Table:
    """One table of all runs, or of one, with the column run_id; empty if no run has finished.

    Args:
        folder: Folder of all runs' reports.
        name: Name of the table.
        run_id: The one run; only its file is read.
        damaged: Called for each run whose file is damaged, instead of raising; the others are read.

    Raises:
        StoreError: If a file is damaged.
    """
    parts = [SCHEMAS[name].append(pa.field("run_id", pa.string())).empty_table()]
    for place in sorted((folder / name).glob("run_id=*" if run_id is None else f"run_id={glob.escape(run_id)}")):
        try:
            found = tables_on_disk.read(place, SCHEMAS[name])
        except StoreError as error:
            if damaged is None:
                raise
            damaged(error)
        else:
            named = pa.repeat(place.name.removeprefix("run_id="), len(found))
            parts.append(found.append_column(pa.field("run_id", pa.string()), named))
    return pa.concat_tables(parts)


def read_rows(folder: Path, table: str, row: Callable[..., Row], run_id: str) -> tuple[Row, ...]:
    """One table of one run, as the dataclass `row`.

    Raises:
        StoreError: If the file is damaged.
    """
    names = {field.name for field in fields(row)}  # type: ignore[arg-type]
    found = read_table(folder, table, run_id).to_pylist()
    return tuple(row(**{name: value[name] for name in names}) for value in found)


def read_variants(folder: Path, damaged: Callable[[StoreError], None] | None = None) -> list[tuple[str, VariantRow]]:
    """(run_id, variant) of all runs, the newest run first, variants in the recipe's order; see `read_table`."""
    names = {field.name for field in fields(VariantRow)}
    rows = [
        (row["run_id"], VariantRow(**{name: row[name] for name in names}))
        for row in read_table(folder, "variants", damaged=damaged).to_pylist()
    ]
    started = {run_id: row.created_at for run_id, row in rows}
    return sorted(rows, key=lambda pair: (started[pair[0]], pair[0]), reverse=True)


def choose_run(folder: Path, run_id: str | None = None) -> tuple[str, list[tuple[str, VariantRow]]]:
    """The run to show, and the variants of all runs as in `read_variants`; damaged runs are left out.

    Args:
        folder: Folder of all runs' reports.
        run_id: The run; None: the newest.

    Raises:
        StoreError: If no run has finished, there is none with that name, or its report is damaged.
    """
    damage: list[StoreError] = []
    history = read_variants(folder, damage.append)
    if run_id is not None:
        # Damage to the run itself is an error; other damaged runs are only left out.
        read_table(folder, "variants", run_id)
    elif damage and not history:
        raise damage[0]
    names = list(dict.fromkeys(name for name, _ in history))
    if not names:
        raise StoreError(f"No run has finished below {folder}. Start one with `quantflow run`.")
    if run_id is not None and run_id not in names:
        raise StoreError(f"No run {run_id!r} below {folder}. The newest are: {', '.join(names[:5])}.")
    return run_id or names[0], history


def read_report(folder: Path, run_id: str) -> Report:
    """The results of one run; see `choose_run` for its name.

    Raises:
        StoreError: If a table is damaged.
    """
    found = {name: read_rows(folder, name, row, run_id) for name, row in ROWS.items() if name != "predictions"}
    return Report(run_id=run_id, **found)


def find_earlier(folder: Path, recipe: str, run_id: str) -> list[str]:
    """The finished runs of a recipe before the given one, the newest first; found by name, so no table is read."""
    # How `tasks.execution` names runs: the time, the recipe, eight hexadecimal digits.
    ours = re.compile(rf"run_id=(\d{{8}}-\d{{6}}-{re.escape(recipe)}-[0-9a-f]{{8}})")
    found = [ours.fullmatch(place.name) for place in (folder / "variants").glob("run_id=*")]
    return sorted((match[1] for match in found if match and match[1] < run_id), reverse=True)
