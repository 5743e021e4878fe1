import copy

import pytest
import torch
from torch import nn

from quantlib.errors import ModelError
from quantlib.graph import fusion
from quantlib.models import mobilenet_v2
from quantlib.quantize import equalization

SETTING = [[1, 8, 1, 1], [3, 8, 2, 2], [3, 16, 2, 2]]


@pytest.fixture
def net():
    """A small MobileNetV2 whose BatchNorm has seen images, and whose channel ranges are uneven."""
    torch.manual_seed(0)
    model = mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data = torch.exp(torch.randn(module.num_features))
            module.bias.data.normal_(0, 0.1)
    return model.eval()


def ranges(layer):
    return layer.weight.detach().abs().flatten(1).amax(1)


def logits_of(model):
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("fused", [True, False])
def test_equalize_keeps_logits_within_1e_4(net, fused):
    model = fusion.fuse_model(net, "eval") if fused else net
    assert torch.allclose(logits_of(model), logits_of(equalization.equalize(model, (3, 32, 32))), atol=1e-4)


def test_equalize_leaves_the_model_it_was_given_as_it_was(net):
    before = copy.deepcopy(net.state_dict())
    equalization.equalize(net, (3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_equalize_makes_consecutive_ranges_equal_channel_by_channel():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)
    first.weight.data *= torch.tensor([0.01, 1, 3, 100, 7]).view(-1, 1, 1, 1)
    equal = equalization.equalize(nn.Sequential(first, nn.ReLU(), second), (3, 8, 8))
    # Nagel et al. 2019, eq. 11: both become sqrt(r1 r2).
    incoming = second.weight.detach().abs().amax((0, 2, 3))
    expected = (ranges(first) * incoming).sqrt()
    assert torch.allclose(ranges(equal[0]), expected, rtol=1e-4)
    assert torch.allclose(equal[2].weight.detach().abs().amax((0, 2, 3)), expected, rtol=1e-4)


def test_equalize_goes_through_depthwise_chains_until_they_are_equal():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    chain[0].weight.data *= torch.logspace(-2, 2, 6).view(-1, 1, 1, 1)
    equal = equalization.equalize(chain, (3, 8, 8))
    assert torch.allclose(ranges(equal[0]), ranges(equal[2]), rtol=1e-2)
    assert torch.allclose(ranges(equal[2]), equal[4].weight.detach().abs().amax((0, 2, 3)), rtol=1e-2)


def test_a_rescaled_model_is_equalized_to_the_same_weights(net):
    fused = fusion.fuse_model(net, "eval")
    uneven = copy.deepcopy(fused)
    factors = torch.logspace(-1, 1, uneven.features[1].conv[0][0][0].out_channels)
    depthwise, project = uneven.features[1].conv[0][0][0], uneven.features[1].conv[1]
    depthwise.weight.data *= factors.view(-1, 1, 1, 1)
    depthwise.bias.data *= factors
    project.weight.data /= factors.view(1, -1, 1, 1)
    one, other = equalization.equalize(fused, (3, 32, 32)), equalization.equalize(uneven, (3, 32, 32))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=0.05, atol=1e-4) for a, b in pairs)


def test_blocks_joined_by_an_addition_are_rescaled_together(net):
    groups = [group for group in equalization.find_scale_groups(net) if group.can_rescale()]
    assert max(len(group.producers) for group in groups) == 2  # A block with a shortcut, and the one before it.


def test_layers_between_which_something_is_not_homogeneous_stay_as_they_are():
    torch.manual_seed(0)
    for between in (nn.ReLU6(), nn.Sigmoid(), nn.Hardswish()):
        chain = nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 2, 1))
        equal = equalization.equalize(chain, (3, 4, 4))
        assert all(torch.equal(a, b) for a, b in zip(chain.parameters(), equal.parameters(), strict=True))


def test_a_channel_without_weights_stays_finite():
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    chain[0].weight.data[1] = 0
    chain[2].weight.data[:, 2] = 0
    equal = equalization.equalize(chain, (3, 4, 4))
    assert all(torch.isfinite(parameter).all() for parameter in equal.parameters())


class Branching(nn.Module):
    """Its forward() cannot be traced, but the part inside can."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return self.inside(x) if x.mean() < 100 else x


def test_a_model_that_cannot_be_traced_is_equalized_part_by_part():
    assert sum(group.can_rescale() for group in equalization.find_scale_groups(Branching())) == 1


class Peeking(Branching):
    """Uses a layer's output from outside its container."""

    def forward(self, x):
        return self.inside[0](x) if x.mean() < 100 else x


def test_a_model_that_uses_layers_in_another_order_than_they_stand_is_refused():
    with pytest.raises(ModelError, match="Set equalize = false"):
        equalization.equalize(Peeking(), (3, 4, 4))


class Shared(nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(self.layer(self.layer(x).relu()).relu())


def test_a_layer_that_runs_twice_stays_as_it_is():
    model = Shared()
    assert torch.equal(equalization.equalize(model, (3, 4, 4)).layer.weight, model.layer.weight)
