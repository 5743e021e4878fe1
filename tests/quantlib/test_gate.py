from types import SimpleNamespace

import numpy as np
import pytest

from quantlib import verdict
from quantlib.predictions import Predictions
from quantlib.recipe import GateRecipe


def measured(correct: np.ndarray) -> SimpleNamespace:
    labels = np.zeros(len(correct), dtype=np.int64)
    top5 = np.where(correct, 0, 1).reshape(-1, 1)
    return SimpleNamespace(validation=Predictions(labels, top5, np.zeros(len(correct), np.float32)))


@pytest.mark.parametrize(
    ("num_images", "num_lost", "confidence", "outcome"),
    [
        (1000, 10, None, "inside"),  # Exactly the gate.
        (1000, 11, None, "outside"),
        (1000, 8, 0.95, "undecided"),
        (100_000, 800, 0.95, "inside"),
        (1000, 40, 0.95, "outside"),
    ],
)
def test_the_gate_decides_undecided_only_where_confidence_asks(num_images, num_lost, confidence, outcome):
    right = np.ones(num_images, dtype=bool)
    wrong = right.copy()
    wrong[:num_lost] = False
    gate = GateRecipe(max_top1_drop=0.01, confidence=confidence)
    found, needed = verdict._judge(measured(right), measured(wrong), gate)
    assert found == outcome
    assert (needed is not None and needed > num_images) == (outcome == "undecided")
