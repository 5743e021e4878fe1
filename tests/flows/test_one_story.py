"""The terminal, the page, the dashboard and the tables say the same about a run."""

import json
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rows import file_row, variant_row

from flows.cli.commands import main
from flows.cli.console import conclusion
from quantlib.measure.predictions import Predictions
from quantlib.report import html, summary, tables
from quantlib.report.results import Report
from quantlib.report.rows import NoteRow

WINNER = variant_row(
    "small",
    runtime="openvino",
    artifact_path="/models/small.onnx",
    winner=True,
    pareto=True,
    reason="as fast as large (within noise), as accurate, smallest",
    top1_drop=0.0042,
    top1_drop_low=-0.0021,
    top1_drop_high=0.0105,
    p_value=0.25,
    speedup=3.14,
    latency_p50_ms=1.02,
    top1=0.7458,
    top1_selection=0.79,
    size_bytes=1_000_000,
)
# In the table it beats the winner in accuracy and speed, but only within noise.
RIVAL = variant_row("large", runtime="openvino", pareto=True, latency_p50_ms=1.0, top1=0.7479, size_bytes=2_000_000)
FOUND = Report(
    run_id="20260501-030000-tiny-0000000a",
    variants=(variant_row("float", method="float"), WINNER, RIVAL),
    epochs=(),
    latency=(),
    stages=(),
    files=(file_row("small"), file_row("large")),
    notes=(
        NoteRow(kind="regression", text="small is slower than the winner of the last run."),
        NoteRow(kind="warning", text="40 validation images are few."),
        NoteRow(kind="note", text="The search ended."),
    ),
)
SAID = (
    "-0.42 points of top-1 against float (95% interval -1.05 to +0.21, p = 0.25)",
    "3.14",
    "as fast as large (within noise), as accurate, smallest",
    'quantlib.api.load("/models/small.onnx", "openvino")',
    "small is slower than the winner of the last run.",
    "40 validation images are few.",
    "The search ended.",
)


@pytest.fixture
def reports(tmp_path):
    answers = Predictions(np.array([0]), np.array([[0]]), np.zeros(1, np.float32))
    tables.write(tmp_path, FOUND, {row.variant: answers for row in FOUND.variants})
    return tmp_path


def test_terminal_page_and_dashboard_say_the_same(reports):
    page = unescape(html.render(reports))
    for text in (conclusion(FOUND, 0.01), page, summary.summarize(FOUND, reports)):
        assert [said for said in SAID if said not in text] == []


def test_the_tables_hold_all_of_it(reports):
    row = pd.read_parquet(reports / "variants").set_index("variant").loc["small"]
    shown = (row.top1_drop, row.top1_drop_low, row.top1_drop_high, row.p_value, row.speedup, row.reason, row.runtime)
    assert shown == (0.0042, -0.0021, 0.0105, 0.25, 3.14, WINNER.reason, "openvino")
    assert list(pd.read_parquet(reports / "notes").text) == [note.text for note in FOUND.notes]


def test_the_star_lies_on_the_line_of_what_was_compared(reports):
    page = html.render(reports)
    figure = re.search(r'data-chart="chart-tradeoff">(.*?)</script>', page, re.DOTALL)
    assert figure is not None
    traces = json.loads(figure[1])["data"]
    front = next(trace for trace in traces if trace["name"] == "Pareto front")
    assert (WINNER.latency_p50_ms, WINNER.top1) in set(zip(front["x"], front["y"], strict=True))
    starred = [
        (x, y)
        for trace in traces
        if trace is not front
        for x, y, text in zip(trace["x"], trace["y"], trace["text"], strict=True)
        if "★" in text
    ]
    assert starred == [(WINNER.latency_p50_ms, WINNER.top1)]


def test_a_damaged_report_is_named_the_others_are_shown_and_the_page_of_one_is_refused(reports):
    answers = Predictions(np.array([0]), np.array([[0]]), np.zeros(1, np.float32))
    other = replace(FOUND, run_id="20260502-030000-tiny-0000000b")
    tables.write(reports, other, {row.variant: answers for row in other.variants})
    path = reports / "variants" / f"run_id={FOUND.run_id}" / "part-0.parquet"
    path.write_bytes(path.read_bytes().replace(b"small", b"smalL"))
    home = reports.parent / "home"
    home.mkdir()
    reports.rename(home / "reports")

    shown = CliRunner().invoke(main, ["report", "--home", str(home)])
    assert shown.exit_code == 1
    assert other.run_id in shown.stdout
    assert FOUND.run_id not in shown.stdout
    assert f"`quantflow resume {FOUND.run_id}` rebuilds it" in shown.stderr
    page = CliRunner().invoke(main, ["report", "--home", str(home), "--html", str(home / "x"), FOUND.run_id])
    assert page.exit_code == 1
    assert "is damaged" in page.stderr
    assert "is damaged" in summary.summarize(other, home / "reports")
    assert CliRunner().invoke(main, ["report", "--home", str(home), "--html", str(home / "x")]).exit_code == 0
