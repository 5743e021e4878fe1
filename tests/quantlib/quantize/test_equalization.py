import copy

import pytest
import torch
from torch import nn

from quantlib.errors import ModelError
from quantlib.graph import fusion
from quantlib.graph.tracing import trace
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
    return trace(model, (3, 32, 32))


def ranges(layer):
    return layer.weight.detach().abs().flatten(1).amax(1)


def incoming_ranges(layer):
    return layer.weight.detach().abs().amax((0, 2, 3))


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
    expected = (ranges(first) * incoming_ranges(second)).sqrt()
    equal = equalization.equalize(trace(nn.Sequential(first, nn.ReLU(), second), (3, 8, 8)), (3, 8, 8))
    # Nagel et al. 2019, eq. 11: both become sqrt(r1 r2).
    assert torch.allclose(ranges(equal.get_submodule("0")), expected, rtol=1e-4)
    assert torch.allclose(incoming_ranges(equal.get_submodule("2")), expected, rtol=1e-4)


def test_equalize_goes_through_depthwise_chains_until_they_are_equal():
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    chain[0].weight.data *= torch.logspace(-2, 2, 6).view(-1, 1, 1, 1)
    equal = equalization.equalize(trace(chain, (3, 8, 8)), (3, 8, 8))
    first, depthwise, last = (equal.get_submodule(path) for path in ("0", "2", "4"))
    assert torch.allclose(ranges(first), ranges(depthwise), rtol=1e-2)
    assert torch.allclose(ranges(depthwise), incoming_ranges(last), rtol=1e-2)


def test_a_rescaled_model_is_equalized_to_the_same_weights(net):
    fused = fusion.fuse_model(net, "eval")
    uneven = copy.deepcopy(fused)
    depthwise, project = (uneven.get_submodule(f"features.1.conv.{path}") for path in ("0.0", "1"))
    factors = torch.logspace(-1, 1, depthwise.out_channels)
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
        chain = trace(nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 2, 1)), (3, 4, 4))
        equal = equalization.equalize(chain, (3, 4, 4))
        assert all(torch.equal(a, b) for a, b in zip(chain.parameters(), equal.parameters(), strict=True))


def test_a_channel_without_weights_stays_finite():
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    chain[0].weight.data[1] = 0
    chain[2].weight.data[:, 2] = 0
    equal = equalization.equalize(trace(chain, (3, 4, 4)), (3, 4, 4))
    assert all(torch.isfinite(parameter).all() for parameter in equal.parameters())


class Branching(nn.Module):
    """Cannot be traced: it branches on values."""

    def __init__(self, hidden=()):
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.hidden = list(hidden)  # Layers from elsewhere, which are not its submodules.

    def forward(self, x):
        x = self.inside(x) if x.mean() < 100 else x
        return x + sum(layer.weight.mean() for layer in self.hidden)


def chain_with(part):
    torch.manual_seed(0)
    ends = [nn.Conv2d(3, 4, 1), nn.ReLU(), part, nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)]
    ends[0].weight.data[0] *= 100
    ends[4].weight.data[0] *= 100
    return nn.Sequential(*ends)


def test_around_what_is_taken_as_a_whole_layers_stay_as_they_are_and_others_do_not():
    model = trace(chain_with(Branching()), (3, 4, 4))
    equal = equalization.equalize(model, (3, 4, 4))
    before = dict(model.named_parameters())
    changed = {name for name, value in equal.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"4.weight", "4.bias", "6.weight"}


def test_a_model_that_reads_its_layers_in_a_way_that_the_graph_does_not_show_is_refused():
    model = chain_with(Branching())
    model[2].hidden.append(model[4])
    with pytest.raises(ModelError, match="Set equalize = false"):
        equalization.equalize(trace(model, (3, 4, 4)), (3, 4, 4))


class Shared(nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(self.layer(self.layer(x).relu()).relu())


def test_a_layer_that_runs_twice_stays_as_it_is():
    model = trace(Shared(), (3, 4, 4))
    assert torch.equal(equalization.equalize(model, (3, 4, 4)).layer.weight, model.layer.weight)


class ReadsWeight(Shared):
    """A layer's weight is read by something else, too."""

    def forward(self, x):
        return self.last(self.layer(x).relu()) * self.layer.weight.mean()


def test_a_layer_whose_weight_is_also_read_elsewhere_stays_as_it_is():
    model = trace(ReadsWeight(), (3, 4, 4))
    equal = equalization.equalize(model, (3, 4, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), equal.parameters(), strict=True))


class Functional(Shared):
    """The same function of two layers as a chain, without any module between them."""

    def forward(self, x):
        x = torch.nn.functional.relu(self.layer(x), inplace=True)
        return self.last(torch.nn.functional.avg_pool2d(x, 2)).mean([2, 3])


def test_functions_between_layers_count_as_their_modules_do():
    torch.manual_seed(0)
    model = trace(Functional(), (3, 4, 4))
    equal = equalization.equalize(model, (3, 4, 4))
    assert torch.allclose(ranges(equal.layer), incoming_ranges(equal.last), rtol=1e-2)
    assert not torch.allclose(ranges(model.layer), incoming_ranges(model.last), rtol=1e-2)


def test_a_model_fused_for_training_after_equalization_computes_the_same(net):
    trainable = fusion.fuse_model(equalization.equalize(net, (3, 32, 32)), "qat").eval()
    assert torch.allclose(logits_of(net), logits_of(trainable), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_is_in_the_mode_of_the_model(net, training):
    assert equalization.equalize(net.train(training), (3, 32, 32)).training == training
    assert net.training == training
