"""Quantization-aware training, epoch by epoch."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from schemes import SCHEDULE, scheme
from torch import nn

from quantlib.data import loading, shards
from quantlib.data.normalization import IMAGENET
from quantlib.data.transforms import EvalTransform, TrainTransform
from quantlib.graph import fusion
from quantlib.graph.tracing import trace
from quantlib.measure import evaluation
from quantlib.models import checkpoint
from quantlib.quantize import conversion, preparation, qat, stored

TRANSFORM = TrainTransform(crop=(32, 32), scale=(0.5, 1.0), flip=0.5)


@pytest.fixture(scope="module")
def fused_content(trained_model, tiny_header):
    """The trained net, fused in mode "qat"."""
    traced = trace(copy.deepcopy(trained_model), tiny_header.input_shape)
    return checkpoint.save(fusion.fuse_model(traced, "qat"), replace(tiny_header, fused="qat"))


def _load(content, qconfig="fbgemm"):
    model, header = stored.open_model(content)
    return preparation.prepare_qat(model, scheme(qconfig)) if header.state == "fused" else model


def _save(model, header, qconfig="fbgemm"):
    return checkpoint.save(model, replace(header, fused="qat", scheme=scheme(qconfig)))


def _train(model, epoch, split, schedule=SCHEDULE, **kwargs):
    return qat.train_epoch(model, epoch, schedule, split, np.arange(len(split)), TRANSFORM, **kwargs)


def _assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name, value in got.items() if not torch.equal(value, expected[name])] == []


def _pick(model, *endings):
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith(endings)}


def _batch_norm(model):
    return _pick(model, "running_mean", "running_var")


def _ranges(model):
    return _pick(model, "min_val", "max_val", "scale", "zero_point", "largest")


# Resuming


@pytest.mark.parametrize("qconfig", ["fbgemm", "default"])
def test_epochs_resumed_from_saved_bytes_are_bit_for_bit_those_of_an_uninterrupted_run(
    fused_content, tiny_header, train_split, qconfig
):
    straight = _load(fused_content, qconfig)
    content = fused_content
    for epoch in range(4):  # BatchNorm is frozen in epoch 2, observers in epoch 3
        expected = _train(straight, epoch, train_split)
        torch.rand(3)  # another process has another random state
        resumed = _load(content, qconfig)
        got = _train(resumed, epoch, train_split)
        content = _save(resumed, tiny_header, qconfig)

        assert got == expected
        _assert_equal(resumed.state_dict(), straight.state_dict())
        assert content == _save(straight, tiny_header, qconfig)


def test_an_epoch_depends_on_its_number_and_the_seed(fused_content, train_split):
    losses = {
        _train(_load(fused_content), epoch, train_split, replace(SCHEDULE, seed=seed)).loss
        for epoch, seed in ((0, 7), (1, 7), (0, 1000))
    }

    assert len(losses) == 3


def test_a_saved_epoch_converts_and_is_nearly_as_accurate(fused_content, tiny_header, train_split, val_shard):
    model = _load(fused_content)
    _train(model, 0, train_split)

    prepared, _ = stored.open_model(_save(model, tiny_header))
    quantized = conversion.convert(prepared, scheme("fbgemm"))

    assert evaluation.evaluate(quantized, val_shard, batch_size=18).top1 > 0.9


@pytest.mark.parametrize("epochs", [1, 4])
def test_an_epoch_handed_over_converts_to_the_bytes_of_one_read_back(fused_content, tiny_header, train_split, epochs):
    model = _load(fused_content)
    for epoch in range(epochs):  # BatchNorm and observers are frozen in the last of four.
        _train(model, epoch, train_split)

    header = replace(tiny_header, fused="qat", scheme=scheme("fbgemm"))
    content = stored.hand_over(model, header)
    handed_over, read_back = (
        conversion.convert(stored.open_model(content)[0], scheme("fbgemm"), inplace=True) for _ in range(2)
    )

    header = replace(header, quantized=True)
    assert checkpoint.save(handed_over, header) == checkpoint.save(read_back, header)


# Freezing


def test_statistics_move_until_they_are_frozen_and_no_further(fused_content, train_split):
    model = _load(fused_content)
    moved: list[tuple[bool, bool]] = []
    for epoch in range(4):
        batch_norm, ranges = _batch_norm(model), _ranges(model)
        weight = model.get_submodule("features.0.0").weight.clone()
        metrics = _train(model, epoch, train_split)
        assert metrics.batch_norm_frozen == (epoch >= 1)
        assert metrics.observers_frozen == (epoch >= 2)
        assert not torch.equal(weight, model.get_submodule("features.0.0").weight)  # weights keep learning
        moved.append(
            tuple(
                any(not torch.equal(value, after[name]) for name, value in before.items())
                for before, after in ((batch_norm, _batch_norm(model)), (ranges, _ranges(model)))
            )
        )

    # Frozen at the end of epochs 1 and 2, so still from epochs 2 and 3 on.
    assert moved == [(True, True), (True, True), (False, True), (False, False)]


def test_frozen_batch_norm_normalizes_with_its_statistics_also_after_a_resume(fused_content, tiny_header, train_split):
    model = _load(fused_content)
    for epoch in range(2):
        _train(model, epoch, train_split)
    before = _batch_norm(model)
    resumed = _load(_save(model, tiny_header))

    _train(resumed, 2, train_split)

    _assert_equal(_batch_norm(resumed), before)
    norms = [module for module in resumed.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 13
    assert not any(norm.training for norm in norms)


def test_evaluating_an_epoch_changes_nothing_in_it(fused_content, train_split, val_shard):
    model = _load(fused_content)
    _train(model, 0, train_split)
    before = copy.deepcopy(model.state_dict())

    evaluation.evaluate(conversion.convert(model, scheme("fbgemm")), val_shard, batch_size=18)

    _assert_equal(model.state_dict(), before)
    assert model.training


# What is trained on, and what is reported


def test_a_full_epoch_sees_every_image_once(fused_content, train_split):
    seen: list[int] = []
    watched = replace(train_split, open=lambda index: seen.append(index) or train_split.open(index))
    calls: list[tuple[int, int]] = []
    metrics = _train(
        _load(fused_content),
        0,
        watched,
        replace(SCHEDULE, batches_per_epoch=None, batch_size=8),
        progress=lambda done, total: calls.append((done, total)),
    )

    assert sorted(seen) == list(range(36))
    assert metrics.num_images == 36
    assert calls == [(step, 5) for step in range(1, 6)]  # four of 8 images, one of 4


def test_a_last_batch_of_one_image_is_dropped(fused_content, train_split):
    metrics = _train(_load(fused_content), 0, train_split, replace(SCHEDULE, batches_per_epoch=None, batch_size=7))

    assert metrics.num_images == 35


def test_an_epoch_takes_its_batches_from_the_given_images_alone(fused_content, train_split):
    seen: list[int] = []
    watched = replace(train_split, open=lambda index: seen.append(index) or train_split.open(index))

    metrics = qat.train_epoch(_load(fused_content), 0, SCHEDULE, watched, np.arange(10, 30), TRANSFORM)

    assert metrics.num_images == 12
    assert len(set(seen)) == 12
    assert set(seen) <= set(range(10, 30))


class _Fixed(nn.Module):
    """Gives the same logits for every image, whatever it learns."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return torch.tensor([2.0, 0.0, 0.0]).expand(len(x), 3) + 0 * self.scale


def test_loss_and_accuracy_are_means_over_images_and_not_over_batches(train_split):
    schedule = replace(SCHEDULE, batches_per_epoch=None, batch_size=5)
    indices = np.concatenate([np.arange(5), np.arange(12, 14)])  # five of class 0, two of class 1: batches of 5 and 2

    metrics = qat.train_epoch(_Fixed(), 3, schedule, train_split, indices, EvalTransform(resize=32, crop=(32, 32)))

    # Cross-entropy of softmax([2, 0, 0]), in nats.
    normalizer = np.log(np.exp(2) + 2)
    assert metrics.loss == pytest.approx((5 * (normalizer - 2) + 2 * normalizer) / 7)
    assert metrics.train_top1 == pytest.approx(5 / 7)
    assert metrics.epoch == 3


def test_a_step_is_plain_gradient_descent(fused_content, train_split):
    schedule = replace(SCHEDULE, batches_per_epoch=1)
    model, twin = _load(fused_content), _load(fused_content)
    _train(model, 0, train_split, schedule)

    torch.manual_seed(schedule.seed)
    order = loading.shuffled(len(train_split), schedule.seed)[: schedule.batch_size]
    pixels, labels = next(loading.batches(train_split, order, TRANSFORM, schedule.seed, schedule.batch_size))
    twin.train().to(memory_format=torch.channels_last)
    logits = twin(shards.to_input(torch.from_numpy(pixels), IMAGENET))
    nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    weight = twin.get_submodule("classifier.1").weight

    expected = (weight - schedule.learning_rate * weight.grad).detach()
    torch.testing.assert_close(model.get_submodule("classifier.1").weight.detach(), expected)
