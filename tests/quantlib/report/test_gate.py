"""The gate, where evaluation ends once the verdict is certain."""

import numpy as np
import pytest

from quantlib.measure.predictions import Predictions
from quantlib.recipe.sections import GateRecipe
from quantlib.report.gate import certain_interval, find_drop, judge_drop

NUM_IMAGES = 2000


def answers(*, wrong, seed=0):
    """Answers to images in random order, some of them wrong; float is right on all."""
    labels = np.zeros(NUM_IMAGES, np.int64)
    likeliest = np.random.default_rng(seed).permutation(np.arange(NUM_IMAGES) < wrong).astype(np.int64)
    return Predictions(labels, likeliest[:, None], np.zeros(NUM_IMAGES, np.float32))


FLOAT = answers(wrong=0)
GATE, SURE = GateRecipe(max_top1_drop=0.01), GateRecipe(max_top1_drop=0.01, confidence=0.9)


def outcome(found, count, gate=GATE):
    return judge_drop(FLOAT, found.first(count), gate, NUM_IMAGES)[0]


def test_a_few_images_decide_what_is_clear_and_more_what_is_close():
    assert outcome(answers(wrong=0), 250) == "undecided"
    assert outcome(answers(wrong=0), 1000) == "inside"
    assert outcome(answers(wrong=200), 250) == "outside"
    assert outcome(answers(wrong=18), 1000) == "undecided"


@pytest.mark.parametrize(("wrong", "expected"), [(20, "inside"), (21, "outside")])
def test_all_images_always_decide_and_a_drop_of_exactly_the_gate_is_inside(wrong, expected):
    assert outcome(answers(wrong=wrong), NUM_IMAGES) == expected


def test_with_a_confidence_the_verdict_is_about_all_images_like_these():
    found = answers(wrong=18)
    assert outcome(found, NUM_IMAGES, SURE) == "undecided"
    interval = certain_interval(FLOAT, found, SURE, NUM_IMAGES)
    assert interval.low < interval.drop == pytest.approx(0.009)
    assert interval.high > SURE.max_top1_drop


def test_an_undecided_variant_says_about_how_many_images_would_decide():
    kind, needed = judge_drop(FLOAT, answers(wrong=4).first(500), GATE, NUM_IMAGES)
    assert kind == "undecided"
    assert needed is not None
    assert needed > 500


def test_float_is_compared_on_the_images_that_the_variant_saw():
    found = answers(wrong=100)
    some = found.first(400)
    for stopped in (True, False):
        drop = find_drop(FLOAT, some, stopped=stopped)
        assert drop.drop == pytest.approx(1 - some.top1)
        assert drop.low < drop.drop < drop.high
