"""Models as people write them: each becomes a correct int8 model, or is refused with one clear error."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantlib import api
from quantlib.errors import ModelError
from quantlib.graph.model import trace_model
from quantlib.graph.tracing import untraced
from quantlib.models import registry

SHAPE = (3, 16, 16)


class Net(nn.Module):
    """What the models below have in common."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

    def body(self, x):
        return self.second(self.first(x).relu())


class BranchOnShape(Net):
    def body(self, x):
        if x.shape[-1] > 8:
            x = functional.avg_pool2d(x, 2)
        return super().body(x)


class BranchOnData(Net):
    def body(self, x):
        if x.sum() < 0:
            x = -x
        return self.second(self.first(x).relu())


class BranchInside(Net):
    def __init__(self):
        super().__init__()
        self.second = BranchingConv()


class BranchingConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        y = self.conv(x)
        return y if float(y.abs().max()) < 100 else y / 2


class ModuleUsedTwice(Net):
    def body(self, x):
        x = self.first(x).relu()
        return self.second(self.second(x).relu())


class TiedWeights(Net):
    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.third.weight = self.second.weight

    def body(self, x):
        return self.third(super().body(x).relu())


class FunctionalConvolution(Net):
    def body(self, x):
        x = functional.conv2d(x, self.first.weight, self.first.bias, padding=1)
        return functional.conv2d(functional.relu(x), weight=self.second.weight, stride=2)


class StandardizedWeights(Net):
    def __init__(self):
        super().__init__()
        self.second.gain = nn.Parameter(torch.full((8, 1, 1, 1), 0.5))

    def body(self, x):
        weight = self.second.weight * self.second.gain
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(self.first(x).relu(), weight, self.second.bias)


class InPlace(Net):
    def body(self, x):
        x = self.first(x)
        y = functional.relu_(x)  # `x` itself has changed as well.
        y += x
        return self.second(y.mul_(0.5).add_(x))


class LoopOverTensors(Net):
    def body(self, x):
        parts = [self.second(part) for part in torch.stack([self.first(x), -self.first(x)], 1).unbind(1)]
        return sum(parts[1:], parts[0])


class KeywordCalls(Net):
    def body(self, x):
        return self.second(input=functional.relu(input=self.first(input=x)))


class UnusedBranch(Net):
    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(8, 8, 1)

    def body(self, x):
        x = self.first(x).relu()
        self.unused(x)
        return self.second(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x * 2

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * 2


class CustomAutograd(Net):
    def body(self, x):
        return self.second(Doubled.apply(self.first(x)))


class CountsImages(Net):
    def body(self, x):
        return super().body(x) + (1.0 if len(x) == 1 else 2.0)


class FlattensByLen(Net):
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)).view(len(x), -1))


class Einsum(Net):
    def body(self, x):
        return torch.einsum("nchw,dc->ndhw", super().body(x), self.head.weight[:, :8].repeat(2, 1)[:8])


class SamePadding(Net):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 8, 5, padding="same")


class CrossAttention(Net):
    """Attention between two sequences, which torch's own module computes with weights of its own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, x):
        tokens = self.body(x).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(self.query.expand(x.shape[0], -1, -1), tokens, tokens)
        return self.head(mixed.mean(1))


class CrossAttentionInside(Net):
    def __init__(self):
        super().__init__()
        self.rest = BranchingAttention()

    def forward(self, x):
        return self.rest(self.body(x))


class BranchingAttention(CrossAttention):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        tokens = self.second(self.first(x).relu()).flatten(2).transpose(1, 2)
        mixed = self.attention(self.query.expand(x.shape[0], -1, -1), tokens, tokens)[0]
        if mixed.abs().max() > 100:
            mixed = mixed / 2
        return self.head(mixed.mean(1))


class Transformer(Net):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.first(x).flatten(2).transpose(1, 2)).mean(1))


class MaskedTransformer(Transformer):
    """With a mask, the whole encoder is left to torch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.zeros(256, 256))

    def forward(self, x):
        return self.head(self.encoder(self.first(x).flatten(2).transpose(1, 2), mask=self.mask).mean(1))


class TupleInside(Net):
    def __init__(self):
        super().__init__()
        self.both = Both()

    def body(self, x):
        x, half = self.both(self.first(x))
        return self.second(x) + half["half"]


class Both(nn.Module):
    def forward(self, x):
        return x.relu(), {"half": x / 2}


def _trained(kind):
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        (BranchOnShape, 1.0),
        (BranchOnData, 1.0),
        (BranchInside, 1.0),
        (ModuleUsedTwice, 1.0),
        (TiedWeights, 1.0),
        (FunctionalConvolution, 1.0),
        (StandardizedWeights, 1.0),
        (InPlace, 1.0),
        (FlattensByLen, 1.0),
        (LoopOverTensors, 1.0),
        (KeywordCalls, 1.0),
        (UnusedBranch, 1.0),
        (CustomAutograd, 1.0),
        (Einsum, 0.9),
        (SamePadding, 1.0),
        (TupleInside, 1.0),
        (CrossAttention, 0.5),
        (CrossAttentionInside, 0.5),
        (Transformer, 0.1),
        (MaskedTransformer, 0.5),
    ],
)
def test_a_model_as_people_write_them_is_quantized(kind, share, tmp_path):
    model, images = _trained(kind), torch.randn(16, *SHAPE)
    quantized = api.quantize(model, [images])
    with torch.inference_mode():
        expected = model(images)
    answers = quantized(images)
    assert float((answers - expected).square().mean() / expected.square().mean()) < 0.01
    layers = quantized.layers
    total = sum(layer.num_multiplications for layer in layers)
    assert sum(layer.num_multiplications for layer in layers if layer.int8) >= share * total > 0
    assert all(layer.reason for layer in layers if not layer.int8)
    quantized.save(tmp_path / "model.pt")
    got = api.load(tmp_path / "model.pt")(images)
    assert float((got - answers).square().mean() / answers.square().mean()) < 0.01


def test_an_answer_that_depends_on_the_number_of_images_is_kept():
    model, images = _trained(CountsImages), torch.randn(16, *SHAPE)
    quantized = api.quantize(model, [images])
    with torch.inference_mode():
        assert float((quantized(images[:1]) - model(images[:1])).abs().max()) < 0.1
        assert float((quantized(images) - model(images)).abs().max()) < 0.1


def test_the_number_of_images_may_be_asked_for_with_len():
    traced = trace_model(_trained(FlattensByLen), SHAPE)
    assert untraced(traced) == ()
    assert traced(torch.randn(5, *SHAPE)).shape == (5, 5)
    assert len([1, 2]) == 2


def test_answers_that_are_random_are_refused():
    class Random(Net):
        def body(self, x):
            return super().body(x + torch.rand(1))

    with pytest.raises(ModelError, match="Random answers differently when it is asked again"):
        api.quantize(_trained(Random), [torch.randn(4, *SHAPE)])


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="no Conv2d and no Linear: there is nothing to quantize"):
        api.quantize(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), [torch.randn(4, *SHAPE)])


@pytest.mark.parametrize(
    ("forward", "got"),
    [(lambda _self, x: {"logits": x.flatten(1)[:, :5]}, "dict"), (lambda _self, x: (x, x), "tuple")],
)
def test_a_model_that_gives_no_logits_is_refused(forward, got):
    model = type("NoLogits", (nn.Module,), {"forward": forward})()
    with pytest.raises(ModelError, match=f"gives {got} for one image"):
        registry.check_logits(model, 5, SHAPE)


def test_a_model_that_takes_two_images_is_refused():
    model = type("TwoImages", (nn.Module,), {"forward": lambda _self, x, y: x + y})()
    with pytest.raises(ModelError, match="cannot take an image of 16 x 16 pixels in 3 channels"):
        registry.check_logits(model, 5, SHAPE)
