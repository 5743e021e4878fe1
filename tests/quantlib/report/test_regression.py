"""The gate against regressions."""

import pytest
from finished_runs import FIRST, NUM_IMAGES, SECOND, THIRD, answers, report, write_run

from quantlib.report.model_change import Results
from quantlib.report.regression import check_regression
from quantlib.report.tables import predictions_table
from quantlib.store.local import Store


def check(home, *, num_right=90, **changes):
    """The note of a third run: its kind and text."""
    names = [f"{n}.png" for n in range(NUM_IMAGES)]
    answered = predictions_table({"float": answers(92), "small": answers(num_right)}, names)
    results = Results(report(THIRD, num_right=num_right, **changes), answered, "f0")
    note = check_regression(home / "reports", Store(home / "store"), results)
    return note.kind, note.text


def test_a_winner_as_good_as_the_last_passes_and_the_note_says_what_was_compared(tmp_path):
    write_run(tmp_path, FIRST, num_right=99)
    write_run(tmp_path, SECOND)
    kind, text = check(tmp_path)
    assert kind == "note"
    assert text.startswith(f"No regression against the winner of run {SECOND}, small in onnxruntime: +0.00 points")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_right": 84}, "small in onnxruntime is less accurate than the winner of run"),
        ({"milliseconds": 1.2}, "small in onnxruntime is slower than the winner of run"),
        ({"num_right": 80, "milliseconds": 1.2}, "is less accurate and slower than"),
        (
            {"winner": False},
            f"no variant is inside the gate, while the winner of run {SECOND}, small in onnxruntime, was",
        ),
    ],
)
def test_a_winner_that_is_worse_is_a_regression_that_says_why(change, said, tmp_path):
    write_run(tmp_path, SECOND)
    kind, text = check(tmp_path, **change)
    assert kind == "regression"
    assert said in text


@pytest.mark.parametrize("change", [{"num_right": 85}, {"num_right": 99}, {"milliseconds": 0.5}])
def test_a_difference_within_chance_and_an_improvement_pass(change, tmp_path):
    write_run(tmp_path, SECOND)
    assert check(tmp_path, **change)[0] == "note"


def test_a_run_without_a_winner_is_passed_over(tmp_path):
    write_run(tmp_path, FIRST, num_right=99)
    write_run(tmp_path, SECOND, winner=False)
    kind, text = check(tmp_path)
    assert kind == "regression"
    assert FIRST in text


def test_nothing_to_compare_with_passes_and_is_said(tmp_path):
    assert check(tmp_path, num_right=10) == (
        "note",
        "Not checked for a regression: no earlier run of recipe tiny here has a winner.",
    )
    write_run(tmp_path, SECOND.replace("tiny", "other"))
    write_run(tmp_path, THIRD.replace("2026", "2027"))
    assert check(tmp_path, num_right=10)[0] == "note"


def test_a_damaged_report_of_the_last_run_passes_and_is_named(tmp_path):
    write_run(tmp_path, SECOND)
    file = tmp_path / "reports" / "latency" / f"run_id={SECOND}" / "part-0.parquet"
    file.write_bytes(b"damaged")
    kind, text = check(tmp_path, num_right=10)
    assert kind == "note"
    assert text.startswith(f"Not checked for a regression: The report {file} is damaged")
