"""Training from scratch."""

import itertools

import numpy as np
import pytest
import torch

from quantlib.data.transforms import EvalTransform
from quantlib.measure import evaluation
from quantlib.models import mobilenet_v2, training
from quantlib.recipe.sections import TrainingRecipe

random_states = itertools.count()


@pytest.fixture
def recipe():
    return TrainingRecipe(epochs=2, batch_size=10, learning_rate=0.05)


def _train(split, recipe, arguments, seed=3):
    torch.manual_seed(0)
    model = mobilenet_v2.mobilenet_v2(**arguments)
    torch.manual_seed(next(random_states))  # earlier draws in this process must not matter
    calls: list[tuple[int, int]] = []
    training.train(
        model,
        split,
        np.arange(len(split)),
        EvalTransform(resize=32, crop=(32, 32)),
        recipe,
        seed,
        lambda done, total: calls.append((done, total)),
    )
    return model, calls


def test_training_learns_to_tell_three_colours_apart(trained_model, val_shard):
    answers = evaluation.evaluate(trained_model, val_shard, batch_size=18)

    assert answers.top1 == 1.0
    assert answers.mean_loss < 0.5 * np.log(3)  # ln 3 is what guessing costs


def test_training_is_a_function_of_the_seed(train_split, recipe, tiny_arguments):
    first, _ = _train(train_split, recipe, tiny_arguments)
    again, _ = _train(train_split, recipe, tiny_arguments)
    other, _ = _train(train_split, recipe, tiny_arguments, seed=4)

    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.classifier[1].weight, other.classifier[1].weight)


def test_what_is_left_over_at_an_epochs_end_is_dropped(train_split, recipe, tiny_arguments):
    model, calls = _train(train_split, recipe, tiny_arguments)  # 36 images: 3 steps of 10 per epoch

    assert calls == [(step, 6) for step in range(1, 7)]
    assert int(model.features[0][1].num_batches_tracked) == 6


def test_a_trained_model_is_left_in_eval_mode_and_in_plain_memory_order(trained_model):
    assert not any(module.training for module in trained_model.modules())
    assert all(parameter.is_contiguous() for parameter in trained_model.parameters())
