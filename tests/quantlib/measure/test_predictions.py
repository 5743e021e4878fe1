"""Predictions and the accuracies that follow from them."""

import io

import numpy as np
import pandas as pd
import pytest

from quantlib.measure import predictions
from quantlib.measure.predictions import Predictions


@pytest.fixture
def answers():
    """Four images: the label comes first; second; not among the five; last of the five."""
    return Predictions(
        labels=np.array([3, 1, 6, 0]),
        top5=np.array([[3, 1, 2, 0, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 4, 3, 2, 0]]),
        loss=np.array([0.1, 0.7, 3.0, 0.2], dtype=np.float32),
    )


def test_accuracies_are_fractions_of_the_images(answers):
    assert answers.top1_correct.tolist() == [True, False, False, False]
    assert answers.top1 == 0.25
    assert answers.top5_accuracy == 0.75
    assert answers.mean_loss == pytest.approx(1.0)
    assert len(answers) == 4


def test_the_mean_loss_of_many_images_is_not_rounded_to_float32():
    num_images = 100_000
    loss = np.full(num_images, 0.1, dtype=np.float32)
    answers = Predictions(np.zeros(num_images, np.int64), np.zeros((num_images, 1), np.int64), loss)

    assert answers.mean_loss == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_with_fewer_than_five_classes_all_of_them_are_kept(answers):
    two = Predictions(np.array([1, 0]), np.array([[0, 1], [0, 1]]), np.zeros(2, np.float32))

    again = predictions.load(predictions.save(two))

    assert again.top5.tolist() == [[0, 1], [0, 1]]
    assert again.top1 == 0.5
    assert again.top5_accuracy == 1.0


def test_saved_predictions_come_back_exactly(answers):
    again = predictions.load(predictions.save(answers))

    for name in ("labels", "top5", "loss"):
        assert np.array_equal(getattr(again, name), getattr(answers, name)), name
        assert getattr(again, name).dtype == getattr(answers, name).dtype


def test_saved_predictions_have_the_same_bytes_each_time(answers):
    assert predictions.save(answers) == predictions.save(predictions.load(predictions.save(answers)))


def test_saved_predictions_are_a_plain_parquet_file(answers):
    table = pd.read_parquet(io.BytesIO(predictions.save(answers)))

    assert list(table.columns) == ["label", "top5", "loss"]
    assert table["top5"][1].tolist() == [0, 1, 2, 3, 4]


def test_parts_join_in_order(answers):
    first = Predictions(answers.labels[:1], answers.top5[:1], answers.loss[:1])
    rest = Predictions(answers.labels[1:], answers.top5[1:], answers.loss[1:])

    joined = predictions.concatenate([first, rest])

    assert predictions.save(joined) == predictions.save(answers)


def test_no_parts_are_an_error():
    with pytest.raises(ValueError, match="at least one"):
        predictions.concatenate([])
