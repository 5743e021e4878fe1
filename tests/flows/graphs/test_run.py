"""How a flow run ends."""

import os

import harness
import httpx
import numpy as np
from finished_runs import report

from flows.graphs.run import end_state
from quantlib.measure.predictions import Predictions
from quantlib.report import tables
from quantlib.store.journal import read_runs


def make_perfect(home):
    """Change the report of the home's only run: every variant was right on every image."""
    name = harness.run_id_of(home)
    rows = tables.read_table(home / "reports", "predictions", name)
    images = rows.filter([value == "float" for value in rows["variant"].to_pylist()])
    labels = images["label"].to_numpy()
    top5 = np.stack([(labels + n) % 10 for n in range(5)], axis=1)
    right = Predictions(labels, top5, np.zeros(len(labels), np.float32))
    found = tables.read_report(home / "reports", name)
    answers = {row.variant: right for row in found.variants}
    tables.write(home / "reports", found, answers, images["image"].to_pylist())


def test_a_regression_fails_the_flow_run_and_the_run_is_complete(home_copy):
    gate = harness.RECIPE["gate"]
    make_perfect(home_copy)
    done = harness.run(home_copy, recipe=harness.RECIPE | {"gate": gate | {"fail_on_regression": True}})
    assert "Regression: " in done.error
    newest = read_runs(home_copy / "runs")[0]
    assert newest.state == "completed"
    found = tables.read_report(home_copy / "reports", newest.file.run_id)
    assert found.winner is not None
    assert " is less accurate than the winner of run " in found.regression
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"]) as client:
        state = client.get(f"/flow_runs/{newest.file.flow_run_id}").json()["state"]
    assert (state["type"], state["message"]) == ("FAILED", f"Regression: {found.regression}")


def test_without_the_key_nothing_is_compared(home_copy):
    make_perfect(home_copy)
    assert harness.run(home_copy).error == ""
    found = tables.read_report(home_copy / "reports", harness.run_id_of(home_copy))
    assert found.regression is None
    assert not any("regression" in note.text for note in found.notes)


def test_a_flow_without_a_regression_returns_its_report():
    found = report("20260501-030000-tiny-00000001")
    assert end_state(found) is found
