"""Reports as JSON, for programs: what the tables hold, under the names of their columns."""

import json
import math
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any

from quantlib.report import summary
from quantlib.report.results import Report
from quantlib.report.tables import ROWS

_PER_IMAGE = ("predictions", "examples")


def report_as_json(report: Report) -> str:
    """A run's verdict and tables; `predictions` and `examples` are left out, as they have a row for each image.

    Returns:
        {run_id, recipe, winner: a variant's name or null, verdict: one sentence, tables: {TABLE: [{COLUMN: value}]}}.
    """
    return as_json(
        {
            "run_id": report.run_id,
            "recipe": report.variants[0].recipe,
            "winner": report.winner.variant if report.winner else None,
            "verdict": summary.headline(report),
            "tables": {name: getattr(report, name) for name in ROWS if name not in _PER_IMAGE},
        }
    )


def as_json(value: Any) -> str:
    """Dataclasses and what they hold as JSON: a number that is not finite is null, a time is ISO 8601."""
    return json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.isoformat() if isinstance(value, datetime) else value
