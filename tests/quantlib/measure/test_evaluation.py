"""Evaluation of a model on a shard."""

import numpy as np
import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET
from quantlib.export import native
from quantlib.measure import evaluation, predictions
from quantlib.quantize import conversion
from quantlib.runtimes.engine import use_engine


@pytest.fixture
def shard(tmp_path):
    """Three images of one grey level each."""
    pixels = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    pixels[1], pixels[2] = 1, 2
    with (tmp_path / "shard").open("wb") as file:
        shards.save(pixels, np.array([0, 1, 5]), IMAGENET, file)
    return tmp_path / "shard"


class _Table(nn.Module):
    """Logits for each of the three images, looked up by grey level."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x):
        level = (x[:, 0, 0, 0] * IMAGENET.std[0] + IMAGENET.mean[0]) * 255
        return self.logits[level.round().long()]


def test_predictions_are_those_that_one_computes_by_hand(shard):
    logits = [[2.0, 0, 1, -1, -2, -3], [2.0, 0, 1, -1, -2, -3], [0.5, 0.4, 0.3, 0.2, 0.1, 0]]

    answers = evaluation.evaluate(_Table(logits), shard, batch_size=2)

    assert answers.labels.tolist() == [0, 1, 5]
    assert answers.top5.tolist() == [[0, 2, 1, 3, 4], [0, 2, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert answers.top1 == pytest.approx(1 / 3)
    assert answers.top5_accuracy == pytest.approx(2 / 3)
    # -ln softmax(logits)[label]
    expected = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, [0, 1, 5], strict=True)]
    assert answers.loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert answers.loss.dtype == np.float32


def test_two_classes_have_no_five_likeliest(shard):
    with (shard.parent / "two").open("wb") as file:
        shards.save(shards.open_shard(shard).pixels.numpy(), np.array([0, 1, 1]), IMAGENET, file)

    answers = evaluation.evaluate(_Table([[1.0, 0], [0.0, 1], [1.0, 0]]), shard.parent / "two", batch_size=3)

    assert answers.top5.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert answers.top5_accuracy == 1.0


def test_a_shards_predictions_are_the_models_own(trained_model, val_shard, val_inputs):
    answers = evaluation.evaluate(trained_model, val_shard, batch_size=18)

    with torch.inference_mode():
        logits = trained_model(val_inputs)
    labels = shards.open_shard(val_shard).labels
    assert answers.top5.tolist() == logits.argsort(descending=True).tolist()
    assert answers.labels.tolist() == labels.tolist()
    assert answers.mean_loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 17, 100])
def test_the_batch_size_changes_no_int8_prediction(calibrated, val_shard, engine, batch_size):
    int8 = conversion.convert(calibrated("fbgemm"), scheme("fbgemm"))
    with use_engine(engine):
        int8 = native.to_native(int8)
        expected = predictions.save(evaluation.evaluate(int8, val_shard, batch_size=18))
        assert predictions.save(evaluation.evaluate(int8, val_shard, batch_size)) == expected


def test_progress_counts_the_images(shard):
    calls: list[tuple[int, int]] = []
    evaluation.evaluate(_Table([[0.0, 1, 2, 3, 4, 5]] * 3), shard, 2, lambda *call: calls.append(call))

    assert calls == [(2, 3), (3, 3)]


def test_a_tie_goes_to_the_lower_class_as_with_argmax(val_shard):
    class Ties(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 2.0, 2.0, 1.0, 2.0, 0.0, 1.0]).expand(len(x), 7)

    predictions = evaluation.evaluate(Ties(), val_shard, 8)
    assert predictions.top5.tolist() == [[1, 2, 4, 3, 6]] * len(predictions)
