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
    return layer.weight.detach().abs().transpose(0, 1).flatten(1).amax(1)


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


class Attention(nn.Module):
    """As timm writes it: one layer for queries, keys and values."""

    def __init__(self, fused):
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(12, 36), nn.Linear(12, 12), fused

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, 12))


class Torchs(nn.Module):
    """torch's own attention."""

    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, **settings)
        self.attention.in_proj_bias.data.normal_()

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Tokens(nn.Module):
    """A transformer of one layer: patches of 4 pixels, attention, a layer that reads the first token."""

    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.norm, self.attention = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12), attention
        self.last_norm, self.head = nn.LayerNorm(12), nn.Linear(12, 4)
        for norm in (self.norm, self.last_norm):
            norm.weight.data = torch.exp(torch.randn(12))
            norm.bias.data.normal_()

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        return self.head(self.last_norm(x)[:, 0])


def images(seed=0):
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def changed(model, equal):
    before = dict(model.named_parameters())
    return {name for name, value in equal.named_parameters() if not torch.equal(value, before[name])}


def assert_same(model, equal):
    with torch.inference_mode():
        assert torch.allclose(model(images()), equal(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "qkv", "proj"),
    [
        pytest.param(lambda: Attention(fused=True), "attention.qkv", "attention.proj", id="timm"),
        pytest.param(lambda: Attention(fused=False), "attention.qkv", "attention.proj", id="timm, by hand"),
        pytest.param(
            lambda: Torchs(batch_first=True), "attention.attention.in_proj", "attention.attention.out_proj", id="torch"
        ),
    ],
)
def test_the_values_of_attention_are_equalized_with_its_output_and_queries_and_keys_stay(attention, qkv, proj):
    model = trace(Tokens(attention()), (3, 32, 32))
    model.get_submodule(proj).weight.data *= torch.logspace(-2, 2, 12)
    equal = equalization.equalize(model, (3, 32, 32))
    assert changed(model, equal) == {f"{qkv}.weight", f"{qkv}.bias", f"{proj}.weight"}
    before, after = model.get_submodule(qkv).weight, equal.get_submodule(qkv).weight
    assert torch.equal(before[:24], after[:24])
    assert torch.allclose(ranges(equal.get_submodule(qkv))[24:], incoming_ranges(equal.get_submodule(proj)))
    assert_same(model, equal)


class Transposed(Attention):
    """Mixes the channels of its values, not its tokens."""

    def forward(self, x):
        q, _, v = self.qkv(x).chunk(3, -1)
        return self.proj((q.transpose(1, 2) @ v).softmax(1) @ v.transpose(1, 2)).mean(1, keepdim=True)


class Twice(Attention):
    """Its values are also its keys."""

    def forward(self, x):
        q, _, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ v.transpose(1, 2)).softmax(-1) @ v)


class Keys(Attention):
    """Its values are its keys, as one tensor."""

    def forward(self, x):
        q, _, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, v, v))


@pytest.mark.parametrize("attention", [Twice, Keys, Transposed])
def test_values_that_are_read_in_another_way_too_stay_as_they_are(attention):
    net = Tokens(attention(fused=False))
    if attention is Transposed:
        net.attention.proj = nn.Linear(64, 12)
    model = trace(net, (3, 32, 32))
    assert changed(model, equalization.equalize(model, (3, 32, 32))) == set()


def peaks(model, path):
    """The largest absolute value of each channel of a norm's output."""
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, y: found.append(y.abs().amax((0, 1))))
    with torch.inference_mode():
        model(images())
    handle.remove()
    return found[0]


def relative_ranges(layer):
    """By input channel, the largest share of an output's largest weight."""
    weight = layer.weight.detach().abs()
    return (
        (weight / weight.amax((1, 2, 3) if weight.dim() == 4 else 1, keepdim=True)).transpose(0, 1).flatten(1).amax(1)
    )


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_smoothing_moves_a_norms_range_per_channel_into_the_layers_that_read_it(alpha):
    model = trace(Tokens(Attention(fused=True)), (3, 32, 32))
    # Xiao et al. 2022, eq. 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).
    factors = peaks(model, "last_norm") ** alpha / relative_ranges(model.head) ** (1 - alpha)
    equal = equalization.smooth(model, (3, 32, 32), alpha, images())
    assert torch.allclose(equal.last_norm.weight, model.last_norm.weight / factors, rtol=1e-4)
    assert torch.allclose(equal.last_norm.bias, model.last_norm.bias / factors, rtol=1e-4)
    assert torch.allclose(equal.head.weight, model.head.weight * factors, rtol=1e-4)
    assert_same(model, equal)


@pytest.mark.parametrize(
    ("norm", "reader"),
    [
        pytest.param(nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3, padding=1), id="GroupNorm"),
        pytest.param(nn.RMSNorm(8), nn.Linear(8, 2), id="RMSNorm"),
        pytest.param(nn.LayerNorm(8, bias=False), nn.Linear(8, 2, bias=False), id="LayerNorm without bias"),
    ],
)
def test_smoothing_goes_through_every_norm_with_a_weight_per_channel(norm, reader):
    torch.manual_seed(0)
    norm.weight.data = torch.exp(torch.randn(len(norm.weight)))
    model = trace(nn.Sequential(nn.Conv2d(3, 4, 1), norm, reader), (3, 8, 8))
    x = torch.randn(8, 3, 8, 8)
    equal = equalization.smooth(model, (3, 8, 8), 0.5, x)
    assert {"1.weight", "2.weight"} <= changed(model, equal)
    assert torch.allclose(model(x), equal(x), rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """A residual block: two tensors in one group, the sum and what is added, and one in a group of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(c, 4, 1) for c in (3, 4, 4))
        self.relu, self.last = nn.ReLU(), nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.third.bias[0] = -50.0  # Far below 0: the sum's ReLU cuts it off.

    def forward(self, x):
        x = self.first(x)
        return self.last(self.relu(x + self.third(self.relu(self.second(x)))))


def test_smoothing_goes_by_the_values_of_every_tensor_that_is_rounded():
    model, x = trace(Block(), (3, 8, 8)), torch.randn(8, 3, 8, 8)
    equal = equalization.smooth(model, (3, 8, 8), 0.7, x)

    with torch.inference_mode():
        first = model.first(x)
        added = model.third(model.second(first).relu())
    outer = torch.stack([each.abs().amax((0, 2, 3)) for each in (first, added, (first + added).relu())]).amax(0)
    assert outer[0] > 40 > (first + added).relu().amax()
    # The second layer and the last read what the first gives, and the sum.
    factors = outer**0.7 / torch.maximum(relative_ranges(model.second), relative_ranges(model.last)) ** 0.3
    assert torch.allclose(equal.first.bias, model.first.bias / factors, rtol=1e-4)
    assert torch.allclose(equal.third.bias, model.third.bias / factors, rtol=1e-4)
    assert_same(model, equal)


def test_smoothing_undoes_what_single_channels_were_scaled_by():
    torch.manual_seed(0)
    model = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1)), (3, 8, 8))
    uneven, x = copy.deepcopy(model), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        for parameter in (uneven.get_submodule("0").weight, uneven.get_submodule("0").bias):
            parameter[2] *= 1000
        uneven.get_submodule("2").weight[:, 2] /= 1000

    def spread(each):
        values = each.get_submodule("0")(x).relu().amax((0, 2, 3)).detach()
        return float(values.max() / values.min())

    smoothed = equalization.smooth(uneven, (3, 8, 8), 1.0, x)
    assert spread(uneven) > 100
    assert spread(smoothed) == pytest.approx(1.0, rel=1e-4)
    assert_same(uneven, smoothed)


class Read(nn.Module):
    """A norm whose output a layer reads, and something else."""

    def __init__(self, norm, and_also):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer, self.and_also = norm, nn.Linear(8, 8), and_also
        self.first = nn.Conv2d(3, 4, 1)
        if norm.bias is not None:
            norm.bias.data.normal_()

    def forward(self, x):
        y = self.norm(self.first(x))
        return self.layer(y) + self.and_also(y)


@pytest.mark.parametrize(
    ("norm", "and_also"),
    [
        pytest.param(nn.LayerNorm(8), nn.GELU(), id="read by GELU"),
        pytest.param(nn.LayerNorm(8), nn.Identity(), id="part of a sum"),
        pytest.param(nn.LayerNorm(8), nn.MaxPool2d(1), id="pooled over its channels"),
        pytest.param(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8), id="without a weight"),
        pytest.param(nn.LayerNorm([8, 8]), nn.Linear(8, 8), id="with a weight per value"),
        pytest.param(nn.GroupNorm(2, 4), nn.Linear(8, 8), id="layers that mix its pixels"),
    ],
)
def test_smoothing_leaves_a_norm_that_not_only_layers_read_as_it_is(norm, and_also):
    model = trace(Read(norm, and_also), (3, 8, 8))
    equal = equalization.smooth(model, (3, 8, 8), 0.5, torch.randn(8, 3, 8, 8))
    assert changed(model, equal) == set()


class OwnNorm(nn.LayerNorm):
    """A norm as timm writes it: traced into."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_a_norm_that_is_called_as_a_function_of_its_weight_is_smoothed_too():
    model = trace(Read(OwnNorm(8, eps=0.1), nn.Linear(8, 8)), (3, 8, 8))
    x = torch.randn(8, 3, 8, 8)
    equal = equalization.smooth(model, (3, 8, 8), 0.5, x)
    assert changed(model, equal) == {"norm.weight", "norm.bias", "layer.weight", "and_also.weight"}
    assert torch.allclose(model(x), equal(x), rtol=1e-4, atol=1e-5)


def test_equalization_leaves_norms_to_smoothing():
    model = trace(Read(nn.LayerNorm(8), nn.Linear(8, 8)), (3, 8, 8))
    assert changed(model, equalization.equalize(model, (3, 8, 8))) == set()
    smoothed = equalization.smooth(model, (3, 8, 8), 0.5, torch.randn(8, 3, 8, 8))
    assert changed(model, smoothed) == {"norm.weight", "norm.bias", "layer.weight", "and_also.weight"}


def test_a_module_whose_path_is_the_name_of_a_method_is_not_taken_for_the_method():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.contiguous, self.last = nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.last(self.contiguous(self.first(x)))

    model = trace(Named(), (3, 8, 8))
    assert changed(model, equalization.equalize(model, (3, 8, 8))) == set()
