"""`quantflow report`, from hand-made tables."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from rows import file_row, layer_row, preprocessing, variant_row

from flows.cli.commands import main
from quantlib.measure.predictions import Predictions
from quantlib.report import tables
from quantlib.report.results import Report
from quantlib.report.rows import NoteRow

FIRST, SECOND = "20260501-030000-tiny-0000000a", "20260502-030000-tiny-0000000b"
FOUND = Report(
    run_id=FIRST,
    variants=(
        variant_row("float", method="float"),
        variant_row("minmax", winner=True, loss=float("nan"), reason="the only file inside the gate"),
    ),
    files=(file_row("minmax"),),
    notes=(NoteRow(kind="warning", text="Few images."),),
    epochs=(),
    latency=(),
    layers=(layer_row("features.0", sqnr_db=float("inf")),),
    preprocessing=(preprocessing(),),
    stages=(),
)


@pytest.fixture
def home(tmp_path):
    """A home with two finished runs."""
    answers = Predictions(np.array([0]), np.array([[0]]), np.zeros(1, np.float32))
    for found in (FOUND, replace(FOUND, run_id=SECOND, variants=tuple(replace(r, top1=0.5) for r in FOUND.variants))):
        tables.write(tmp_path / "reports", found, {row.variant: answers for row in found.variants})
    return tmp_path


def report(home, *arguments):
    """(exit status, standard output, standard error)"""
    done = CliRunner().invoke(main, ["report", *arguments, "--home", str(home)])
    return done.exit_code, done.stdout, done.stderr


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_json_has_the_verdict_and_the_columns_of_the_tables(home):
    status, out, _ = report(home, FIRST, "--json")
    assert status == 0
    found = json.loads(out, parse_constant=refuse)
    assert (found["run_id"], found["recipe"], found["winner"]) == (FIRST, "tiny", "minmax")
    assert found["verdict"].startswith("Ship minmax in torchscript-x86")
    assert set(found["tables"]) == set(tables.SCHEMAS) - {"predictions", "examples"}
    for name in ("variants", "files", "notes", "layers", "preprocessing"):
        assert set(found["tables"][name][0]) == set(tables.SCHEMAS[name].names)
    assert found["tables"]["variants"][0]["created_at"] == "2026-05-01T03:00:00+00:00"


def test_a_number_that_json_cannot_say_is_null(home):
    _, out, _ = report(home, FIRST, "--json")
    found = json.loads(out, parse_constant=refuse)["tables"]
    assert found["variants"][1]["loss"] is None
    assert found["layers"][0]["sqnr_db"] is None


def test_without_a_run_json_is_about_the_newest(home):
    _, out, _ = report(home, "--json")
    assert json.loads(out)["run_id"] == SECOND


def test_a_run_that_is_named_is_shown_alone(home):
    status, out, _ = report(home, FIRST)
    assert status == 0
    assert FIRST in out
    assert SECOND not in out
    assert SECOND in report(home)[1]


@pytest.mark.parametrize("options", [[], ["--json"], ["--html", "page.html"]])
def test_a_run_that_does_not_exist_is_named_with_those_that_do(options, home):
    status, out, said = report(home, "nowhere", *options)
    assert (status, out) == (1, "")
    assert "No run 'nowhere'" in said
    assert SECOND in said
