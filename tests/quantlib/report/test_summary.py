from dataclasses import replace

import numpy as np
import pytest
from rows import START, variant_row

from quantlib.measure.predictions import Predictions
from quantlib.report import summary, tables
from quantlib.report.results import Report
from quantlib.report.rows import NoteRow, StageRow

FIRST, SECOND = "20260501-030000-tiny-0000000a", "20260502-030000-tiny-0000000b"


FLOAT = variant_row("float", method="float")
PTQ = variant_row(
    "minmax",
    top1=0.7,
    top1_drop=0.05,
    top1_drop_low=0.02,
    top1_drop_high=0.08,
    p_value=0.0031,
    winner=True,
    speedup=4.0,
    latency_p50_ms=2.0,
)


def run(run_id=SECOND, variants=(FLOAT, PTQ), cached=(True, False)):
    stages = tuple(StageRow(f"stage-{n}", "k", reused, 1.5, START) for n, reused in enumerate(cached))
    return Report(run_id=run_id, variants=variants, epochs=(), latency=(), stages=stages)


def write(folder, found):
    answers = Predictions(np.array([0]), np.array([[0]]), np.zeros(1, np.float32))
    tables.write(folder, found, {row.variant: answers for row in found.variants})


def test_the_winner_comes_first(tmp_path):
    text = summary.summarize(run(), tmp_path)
    assert text.startswith(
        "# Ship `minmax`\n\n-5.00 points of top-1 against float (95% interval -8.00 to -2.00, p = 0.0031)"
    )
    assert "first run of recipe `tiny`" in text


def test_without_a_winner_the_page_says_so(tmp_path):
    text = summary.summarize(run(variants=(FLOAT, replace(PTQ, winner=False, accepted=False))), tmp_path)
    assert text.startswith("# Nothing to ship\n\nNo variant is inside the gate. The best so far is `minmax`")


def test_the_table_has_one_line_per_variant(tmp_path):
    text = summary.summarize(run(), tmp_path)
    assert "| `float` | torchscript | 4 | 75.00% |  |  |  | 4.00 MB | 8.00 ms | 1.00x | baseline |" in text
    assert (
        "| `minmax` | torchscript-x86 | 4 | 70.00% | -5.00 | -8.00 to -2.00 | 0.0031 | 4.00 MB | 2.00 ms | 4.00x | "
        "**winner** |" in text
    )


def test_the_verdict_says_how_sure_it_is_why_and_what_is_doubtful(tmp_path):
    doubt = NoteRow(kind="warning", text="Few images.")
    found = replace(run(variants=(FLOAT, replace(PTQ, reason="the fastest inside the gate"))), notes=(doubt,))
    text = summary.summarize(found, tmp_path)
    assert "-5.00 points of top-1 against float (95% interval -8.00 to -2.00, p = 0.0031), 4.00x as fast" in text
    assert "Why this one: the fastest inside the gate." in text
    assert "**Warning:** Few images." in text
    assert summary.headline(found) == "Ship minmax in torchscript-x86: -5.00 points of top-1, 4.00x as fast"


def test_an_unchanged_model_is_no_change_whatever_its_timing(tmp_path):
    write(tmp_path, run(FIRST, (FLOAT, replace(PTQ, latency_p50_ms=3.0))))
    text = summary.summarize(run(), tmp_path)
    assert f"## Since `{FIRST}`\n\nEvery model is the same, and as accurate as before." in text


def test_changes_since_the_last_run_are_listed_by_variant(tmp_path):
    gone = variant_row("old", winner=True)
    write(tmp_path, run(FIRST, (FLOAT, replace(PTQ, winner=False, top1=0.6, artifact_sha256="other"), gone)))
    text = summary.summarize(run(variants=(FLOAT, PTQ, variant_row("fresh", method="qat"))), tmp_path)
    assert "- The winner is `minmax`; it was `old`." in text
    assert "- `minmax` is a different model: +10.00 points of top-1, latency 2.00 to 2.00 ms." in text
    assert "- `fresh` is new." in text
    assert "- `old` is gone." in text
    assert "`float` is" not in text


def test_the_runs_before_are_those_of_the_same_recipe_the_newest_first(tmp_path):
    names = [FIRST, "20260430-030000-tiny-0000000c", "20260501-040000-tiny-b-0000000d", SECOND]
    for name in names:
        (tmp_path / "variants" / f"run_id={name}").mkdir(parents=True)
    assert tables.find_earlier(tmp_path, "tiny", SECOND) == [FIRST, names[1]]
    assert tables.find_earlier(tmp_path, "tiny", names[1]) == []


@pytest.mark.parametrize(
    ("cached", "told"),
    [((True, True), "All 2 stages were reused."), ((True, False), "1 of 2 stages were computed: `stage-1` (1.5 s).")],
)
def test_what_was_computed_is_listed(tmp_path, cached, told):
    assert told in summary.summarize(run(cached=cached), tmp_path)
