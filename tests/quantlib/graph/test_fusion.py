"""Fusion of Conv, BatchNorm and ReLU."""

import copy

import pytest
import torch
from torch import nn

from quantlib.eager.fusing import fuse_modules
from quantlib.graph import fusion
from quantlib.recipe.scheme import FuseMode

MODES: tuple[FuseMode, ...] = ("eval", "qat")


def _count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def test_fusing_for_inference_keeps_logits_within_1e_5(tiny_model, val_inputs):
    with torch.inference_mode():
        before, after = tiny_model(val_inputs), fusion.fuse_model(tiny_model, "eval")(val_inputs)

    assert before.std() > 1e-2
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_fusing_for_training_keeps_logits_within_1e_5_in_eval_mode(tiny_model, val_inputs):
    with torch.inference_mode():
        after = fusion.fuse_model(tiny_model, "qat").eval()(val_inputs)
        torch.testing.assert_close(after, tiny_model(val_inputs), rtol=1e-5, atol=1e-5)


def test_no_batch_norm_is_left_after_fusing_for_inference(tiny_model):
    fused = fusion.fuse_model(tiny_model, "eval")

    assert _count(tiny_model, nn.BatchNorm2d) == 13  # first, last, 2 in the block that does not expand, 3 in the others
    assert _count(fused, nn.BatchNorm2d) == 0
    assert _count(fused, nn.ReLU) == 9  # all but the projections', each inside a fused convolution
    assert not any(module.training for module in fused.modules())


def test_batch_norm_stays_live_when_fusing_for_training(tiny_model, val_inputs):
    fused = fusion.fuse_model(tiny_model, "qat")
    before = {name: value.clone() for name, value in fused.named_buffers() if name.endswith("running_mean")}

    fused(val_inputs)

    assert len(before) == _count(tiny_model, nn.BatchNorm2d)
    assert all(not torch.equal(value, dict(fused.named_buffers())[name]) for name, value in before.items())
    assert fused.training


@pytest.mark.parametrize("mode", MODES)
def test_fusing_leaves_the_given_model_as_it_was(tiny_model, mode):
    before = copy.deepcopy(tiny_model)

    fusion.fuse_model(tiny_model, mode)

    assert repr(tiny_model) == repr(before)
    assert not any(module.training for module in tiny_model.modules())
    for name, value in before.state_dict().items():
        assert torch.equal(value, tiny_model.state_dict()[name]), name


def test_chains_are_found_longest_first_and_once():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
    )

    assert fusion.find_groups(model) == [["0", "1", "2"], ["3", "4"], ["5", "6"], ["9.0", "9.1"]]


@pytest.mark.parametrize("mode", MODES)
def test_a_linear_layer_and_its_relu_become_one(mode):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 4)

    fused = fusion.fuse_model(model, mode)

    assert type(fused[0]).__name__ == "LinearReLU"
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), model(x))


def test_a_model_without_chains_is_copied(val_inputs):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))

    fused = fusion.fuse_model(model, "eval")

    assert fused is not model
    assert torch.equal(fused(val_inputs), model(val_inputs))


class _OwnGroups(nn.Module):
    """Its chains are attributes that only the model itself can know to be chains."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        return self.tail(self.relu(self.norm(self.conv(x))))

    def modules_to_fuse(self):
        return self.groups


def test_a_models_own_list_of_chains_decides_alone(stir_batch_norm, val_inputs):
    model = stir_batch_norm(_OwnGroups([["conv", "norm", "relu"]])).eval()

    fused = fusion.fuse_model(model, "eval")

    assert type(fused.conv).__name__ == "ConvReLU2d"
    assert type(fused.tail[0]) is nn.Conv2d  # not on the list
    torch.testing.assert_close(fused(val_inputs), model(val_inputs), rtol=1e-5, atol=1e-5)


def test_a_model_may_want_nothing_fused():
    fused = fusion.fuse_model(_OwnGroups([]), "eval")

    assert _count(fused, nn.BatchNorm2d) == 1


def test_fusing_nothing_is_no_error(tiny_model):
    fuse_modules(tiny_model, [], "eval")

    assert _count(tiny_model, nn.BatchNorm2d) == 13
