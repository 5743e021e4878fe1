"""Fusion: BatchNorm becomes part of the convolution before it."""

import copy

import pytest
import torch
from torch import nn

from quantlib.graph import fusion
from quantlib.graph.model import trace_model

MODES = ("eval", "qat")
SHAPE = (3, 8, 8)


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def fused(model, mode):
    """A model traced and fused, in eval mode; the model itself stays as it is."""
    return fusion.fuse_model(trace_model(copy.deepcopy(model).eval(), SHAPE), mode).eval()


@pytest.fixture
def traced(tiny_model):
    """The tiny net as a graph; `tiny_model` has the same modules."""
    return trace_model(tiny_model, (3, 32, 32))


@pytest.mark.parametrize("mode", MODES)
def test_fusing_keeps_logits_within_1e_5_in_eval_mode(traced, val_inputs, mode):
    with torch.inference_mode():
        before, after = traced(val_inputs), fusion.fuse_model(traced, mode).eval()(val_inputs)

    assert before.std() > 1e-2
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_no_batch_norm_is_left_after_fusing_for_inference(traced):
    fused = fusion.fuse_model(traced, "eval")

    assert count(traced, nn.BatchNorm2d) == 13  # first, last, 2 in the block that does not expand, 3 in the others
    assert count(fused, nn.BatchNorm2d) == 0
    assert all(type(m) is nn.Conv2d and m.bias is not None for m in fused.modules() if isinstance(m, nn.Conv2d))
    assert not any(module.training for module in fused.modules())


def test_batch_norm_stays_live_when_fusing_for_training(traced, val_inputs):
    fused = fusion.fuse_model(traced, "qat")
    before = {name: value.clone() for name, value in fused.named_buffers() if name.endswith("running_mean")}

    fused(val_inputs)

    assert count(fused, fusion.ConvBatchNorm2d) == len(before) == 13
    assert all(not torch.equal(value, dict(fused.named_buffers())[name]) for name, value in before.items())
    assert all(module.training for module in fused.modules())


@pytest.mark.parametrize("mode", MODES)
def test_layers_keep_their_paths(traced, mode):
    paths = [path for path, module in traced.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]

    fused = fusion.fuse_model(traced, mode)

    assert [path for path, module in fused.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)] == paths
    called = [node.target for node in fused.graph.nodes if node.op == "call_module"]
    assert [path for path in called if path in paths] == paths


@pytest.mark.parametrize("mode", MODES)
def test_fusing_leaves_the_given_model_as_it_was(traced, mode):
    before = repr(traced), traced.code, [module.training for module in traced.modules()]
    state = copy.deepcopy(traced.state_dict())

    fusion.fuse_model(traced, mode)

    assert (repr(traced), traced.code, [module.training for module in traced.modules()]) == before
    for name, value in state.items():
        assert torch.equal(value, traced.state_dict()[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_fusing_in_place_changes_the_model_itself_to_the_same(traced, mode, val_inputs):
    copied = fusion.fuse_model(traced, mode).eval()

    assert fusion.fuse_model(traced, mode, inplace=True) is traced
    with torch.inference_mode():
        assert torch.equal(traced.eval()(val_inputs), copied(val_inputs))
    assert traced.state_dict().keys() == copied.state_dict().keys()


@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_batch_norm_is_copied(mode):
    traced = trace_model(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), SHAPE)
    x = torch.randn(4, *SHAPE)

    fused = fusion.fuse_model(traced, mode)

    assert fused is not traced
    assert not {id(value) for value in fused.parameters()} & {id(value) for value in traced.parameters()}
    assert torch.equal(fused(x), traced(x))


# Which BatchNorm


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 2)])
def test_every_kind_of_convolution_takes_the_batch_norm_after_it(stir_batch_norm, mode, bias, groups, stride):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 8, 3, stride, padding=1, groups=groups, bias=bias, padding_mode="reflect"),
        nn.BatchNorm2d(8, eps=0.1),
    )
    x = torch.randn(4, *SHAPE)
    stir_batch_norm(model).eval()

    after = fused(model, mode)

    assert [node.target for node in after.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)


class Read(nn.Module):
    """Its convolution's output is read by something else, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(nn.Module):
    """Its convolution and its BatchNorm may each serve twice."""

    def __init__(self, *, shared):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 3, 1) if shared == "norm" else nn.BatchNorm2d(3)
        self.shared = shared

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.norm(self.last(x)) if self.shared == "norm" else self.last(self.first(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), id="before a convolution"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), id="behind a ReLU"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), id="without weights"),
        pytest.param(
            nn.Sequential(nn.ConvTranspose2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), id="transposed"
        ),
        pytest.param(Read(), id="convolution read twice"),
        pytest.param(CalledTwice(shared="convolution"), id="convolution called twice"),
        pytest.param(CalledTwice(shared="norm"), id="called twice"),
    ],
)
def test_a_batch_norm_that_is_not_a_convolutions_alone_stays_and_computes_the_same(stir_batch_norm, model, mode):
    torch.manual_seed(0)
    x = torch.randn(4, *SHAPE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            stir_batch_norm(module)
    model.eval()

    after = fused(model, mode)

    assert count(after, fusion.ConvBatchNorm2d) == 0
    assert count(after, nn.BatchNorm2d) == count(model, nn.BatchNorm2d)
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)


class NormAct(nn.BatchNorm2d):
    """As timm has it: BatchNorm and an activation in one."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        x = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 1e-5)
        return self.act(x)


@pytest.mark.parametrize("mode", MODES)
def test_an_activation_inside_a_batch_norm_outlives_it(stir_batch_norm, mode):
    torch.manual_seed(0)
    model = stir_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4))).eval()
    x = torch.randn(4, *SHAPE)

    after = fused(model, mode)

    assert [node.target for node in after.graph.nodes if node.op == "call_module"] == ["0", "1.act"]
    torch.testing.assert_close(after(x), model(x), rtol=1e-5, atol=1e-5)


# A convolution and BatchNorm in training


@pytest.fixture
def pair(stir_batch_norm):
    torch.manual_seed(0)
    return stir_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))


@pytest.mark.parametrize("training", [True, False])
def test_convolution_and_batch_norm_in_one_compute_and_learn_as_the_two_do(pair, training):
    own, pair = fusion.ConvBatchNorm2d.of(*copy.deepcopy(pair)).train(training), pair.train(training)
    x = torch.randn(6, *SHAPE)

    expected, got = pair(x), own(x)
    (expected**3).sum().backward()
    (got**3).sum().backward()

    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for theirs, ours in ((pair[0].weight, own.weight), (pair[1].weight, own.bn.weight), (pair[1].bias, own.bn.bias)):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(own.bn.running_mean, pair[1].running_mean)
    torch.testing.assert_close(own.bn.running_var, pair[1].running_var)


def test_what_is_rounded_in_training_is_the_weight_with_batch_norm_folded_in(pair):
    own, seen = fusion.ConvBatchNorm2d.of(*pair).eval(), []

    class Doubling(nn.Module):
        def forward(self, weight):
            seen.append(weight)
            return 2 * weight

    x, zero = torch.randn(4, *SHAPE), torch.zeros(1, *SHAPE)
    expected = own(zero) + 2 * (own(x) - own(zero))
    own.weight_quantizer = Doubling()

    torch.testing.assert_close(own(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0], own.folded()[0])


def test_the_folded_weight_and_bias_do_what_convolution_and_batch_norm_do(pair):
    x = torch.randn(4, *SHAPE)
    weight, bias = fusion.ConvBatchNorm2d.of(*pair).folded()

    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias, padding=1), pair.eval()(x), rtol=1e-5, atol=1e-5)
    assert not weight.requires_grad
    assert not bias.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_a_channel_that_batch_norm_switches_off_is_constant(pair, mode):
    pair[1].weight.data[1] = 0
    x = torch.randn(4, *SHAPE)

    after = fused(pair, mode)(x)

    assert after.isfinite().all()
    torch.testing.assert_close(after, pair.eval()(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[:, 1], pair[1].bias[1].expand_as(after[:, 1]))


def test_frozen_batch_norm_keeps_its_statistics_until_the_model_is_put_into_training_mode_again(traced, val_inputs):
    fused = fusion.fuse_model(traced, "qat")

    def changed():
        before = {name: value.clone() for name, value in fused.named_buffers()}
        fused(3 * val_inputs)
        return {name for name, value in fused.named_buffers() if not torch.equal(value, before[name])}

    fusion.freeze_batch_norm(fused)
    assert fused.training
    assert changed() == set()
    fused.train()
    assert len(changed()) == 3 * 13  # mean, variance and number of batches
