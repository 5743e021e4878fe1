"""A model as it is, as a graph: the same answers and parameters."""

import copy
import subprocess
import sys

import pytest
import torch
from branching import Branching
from torch import nn
from torchvision import models

from quantlib.errors import ModelError
from quantlib.export import native
from quantlib.graph.model import plan_of, trace_model
from quantlib.graph.tracing import is_whole, untraced

SHAPE = (3, 8, 8)


def traced(model, shape=SHAPE):
    """A copy of a model as a graph."""
    return trace_model(copy.deepcopy(model).eval(), shape)


def called(graph):
    """The modules that a graph calls, in order."""
    return [graph.get_submodule(node.target) for node in graph.graph.nodes if node.op == "call_module"]


def assert_same(model, shape=SHAPE):
    """Compare a model with its graph, on several numbers of images."""
    graph = traced(model, shape)
    for number in (1, 2, 5):
        x = torch.randn(number, *shape)
        with torch.inference_mode():
            torch.testing.assert_close(graph(x.clone()), model.eval()(x.clone()), rtol=1e-5, atol=1e-5)
    return graph


# The same model


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet", "swin_t", "convnext_tiny"]
)
def test_a_classifier_of_torchvision_answers_the_same_once_traced(name, stir_batch_norm):
    torch.manual_seed(0)
    extra = {"init_weights": True} if name == "googlenet" else {}
    model = stir_batch_norm(models.get_model(name, num_classes=10, **extra)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(traced(model, (3, 32, 32))(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_parameters_keep_their_names_and_a_second_graph_is_the_same(name):
    torch.manual_seed(0)
    model = models.get_model(name, num_classes=10).eval()
    names = list(model.state_dict())
    first, second = (traced(model, (3, 32, 32)) for _ in range(2))
    assert list(first.state_dict()) == names
    assert list(second.state_dict()) == names
    assert [n for n, _ in first.named_modules()] == [n for n, _ in second.named_modules()]
    assert first.code == second.code


def test_the_models_modules_become_those_of_the_graph(tiny_model):
    graph = trace_model(tiny_model, (3, 32, 32))

    assert {id(value) for value in graph.parameters()} == {id(value) for value in tiny_model.parameters()}
    assert graph.get_submodule("features.0.0") is tiny_model.features[0][0]
    assert not graph.training


def test_the_plan_of_a_model_leaves_it_as_it_was(tiny_model):
    before = repr(tiny_model), copy.deepcopy(tiny_model.state_dict())

    plan_of(tiny_model, (3, 32, 32))

    assert repr(tiny_model) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in tiny_model.state_dict().items())


class Stubs(nn.Module):
    """Written for torch's own quantization."""

    def __init__(self):
        super().__init__()
        own = native.torch.ao.quantization
        self.quant, self.dequant = own.QuantStub(), own.DeQuantStub()
        self.conv, self.skip_add = nn.Conv2d(3, 3, 1), native.nnq.FloatFunctional()

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(self.skip_add.add(x, self.conv(x)))


def test_a_model_written_for_torchs_own_quantization_is_traced_without_its_stubs():
    graph = assert_same(Stubs())

    assert [type(module) for module in called(graph) if not isinstance(module, nn.Identity)] == [nn.Conv2d]


def test_several_numbers_of_images_give_the_same_as_the_model_does():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x):
            return self.fc(x.view(x.size(0), -1))

    assert_same(Flattening())


# What is written in other ways


class Overwriting(nn.Module):
    """Each way to overwrite a tensor, and tensors that are read again later."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        x += 0.5
        x *= 2
        same = x
        x.sub_(0.25)
        y = self.second(self.relu(x))
        nn.functional.hardtanh(y, -1, 1, inplace=True)
        torch.relu_(y)
        return torch.cat([x, same, y], 1)


def test_nothing_is_overwritten_and_who_reads_it_later_gets_the_same():
    torch.manual_seed(0)
    graph = assert_same(Overwriting())

    for node in graph.graph.nodes:
        assert node.op == "call_module" or not str(getattr(node.target, "__name__", node.target)).endswith("_")
        assert node.kwargs.get("inplace", False) is False
    assert not any(getattr(module, "inplace", False) for module in graph.modules())


class Functional(nn.Module):
    """One ReLU for all, and activations as functions and methods."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x):
        x = self.relu(self.relu(self.conv(x)) - 1)
        x = torch.relu(nn.functional.relu(x - 1) - 1).relu()
        return nn.functional.hardswish(nn.functional.relu6(x))


def test_every_activation_is_a_module_that_is_called_once():
    graph = assert_same(Functional())
    activations = [module for module in called(graph) if not isinstance(module, nn.Conv2d)]

    assert [type(module) for module in activations] == [*[nn.ReLU] * 5, nn.ReLU6, nn.Hardswish]
    assert len({id(module) for module in activations}) == 7
    assert {node.op for node in graph.graph.nodes} == {"placeholder", "call_module", "call_function", "output"}


def test_a_layer_that_serves_twice_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    graph = assert_same(Twice())
    assert sum(module is graph.conv for module in called(graph)) == 2
    assert len(list(graph.parameters())) == 2


def test_dropout_and_depth_are_left_out_in_evaluation_and_random_in_training():
    torch.manual_seed(0)
    model = trace_model(models.efficientnet_b0(num_classes=10).eval(), (3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert not torch.equal(model(x), model(x))


def test_dropout_as_a_function_is_random_in_training_only():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x):
            return nn.functional.dropout(self.fc(x.flatten(1)), 0.5, training=self.training)

    graph, x = assert_same(Dropping()), torch.randn(8, *SHAPE)
    graph.train()
    assert 0 < int((graph(x) == 0).sum()) < 32


# Taken as a whole


def test_of_what_branches_on_values_the_innermost_module_is_taken_as_a_whole():
    inner = nn.Sequential(nn.Conv2d(8, 8, 1), Branching())
    graph = assert_same(nn.Sequential(nn.Conv2d(3, 8, 1), inner, Branching(), nn.ReLU()))

    assert untraced(graph) == ("1.1", "2")
    assert untraced(copy.deepcopy(graph)) == ("1.1", "2")
    assert [type(module) for module in called(graph)] == [nn.Conv2d, nn.Conv2d, Branching, Branching, nn.ReLU]
    assert untraced(traced(nn.Conv2d(3, 8, 1))) == ()


class Branches(nn.Module):
    """Its own forward depends on the values that it sees."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) if x.abs().sum() > 0 else self.conv(x).amax((2, 3))


class Looking(nn.Module):
    """Notices that it is traced."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)) * (1.0 if type(x) is torch.Tensor else 3.0)


class Settings:
    """Something that a graph cannot hold."""

    scale = 2.0


class Configured(nn.Module):
    """Branches, and is given something that a graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x, settings):
        return self.conv(x) * settings.scale if x.abs().sum() > 0 else x


class Configuring(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Configured()

    def forward(self, x):
        return self.inner(x, Settings())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [Branches, Looking, Configuring])
def test_a_model_that_cannot_be_traced_is_taken_as_a_whole(kind):
    graph = assert_same(kind())

    assert is_whole(graph)
    assert [type(module) for module in called(graph)] == [kind]
    assert not is_whole(traced(nn.Conv2d(3, 8, 1)))


# Layers that are written in other ways


class OwnLayers(nn.Module):
    """Computes with parameters of its own, and pads before it convolves."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Parameter(torch.randn(4, 512))

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        x = nn.functional.conv2d(x, weight, self.bias, padding=1)
        x = self.second(nn.functional.pad(x, (1, 1, 1, 1)))
        return nn.functional.linear(x.flatten(1), self.head)


def test_layers_that_are_called_as_functions_become_modules():
    torch.manual_seed(0)
    graph = assert_same(OwnLayers())

    assert [type(module) for module in called(graph)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert [module.padding for module in called(graph)[:2]] == [(1, 1), (1, 1)]


class Attending(nn.Module):
    """Pieces of the image attend to each other."""

    def __init__(self, layer, batch_first=True):
        super().__init__()
        self.proj, self.layer, self.head = nn.Conv2d(3, 8, 4, stride=4), layer, nn.Linear(8, 3)
        self.batch_first, self.is_encoder = batch_first, isinstance(layer, nn.TransformerEncoder)

    def forward(self, x):
        x = self.proj(x).flatten(2).permute(*((0, 2, 1) if self.batch_first else (2, 0, 1)))
        y = self.layer(x) if self.is_encoder else self.layer(x, x, x)[0]
        return self.head(y.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_projections_of_attention_become_layers(batch_first):
    torch.manual_seed(0)
    graph = assert_same(Attending(nn.MultiheadAttention(8, 2, batch_first=batch_first), batch_first))

    assert untraced(graph) == ()
    assert [type(module) for module in called(graph)] == [nn.Conv2d, nn.Linear, nn.Linear, nn.Linear]


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_of_torch_is_traced(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True)
    graph = assert_same(Attending(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)))

    assert untraced(graph) == ()
    assert sum(isinstance(module, nn.Linear) for module in called(graph)) == 2 * 4 + 1


def test_attention_with_keys_of_its_own_is_taken_as_a_whole():
    torch.manual_seed(0)
    graph = assert_same(Attending(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)))

    assert [type(module) for module in called(graph)] == [nn.Conv2d, nn.MultiheadAttention, nn.Linear]


# Refused


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="nothing to quantize"):
        trace_model(nn.Sequential(nn.Flatten(), nn.ReLU()), SHAPE)


class Remembering(nn.Module):
    """Adds how often it has been called."""

    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(192, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x.flatten(1)) + self.calls


class Counting(nn.Module):
    """What it gives for an image depends on how many others there are."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)) / x.shape[0]


class AlwaysDropping(nn.Module):
    """Drops values in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x):
        return nn.functional.dropout(self.fc(x.flatten(1)), 0.5, training=True)


class InOne(nn.Module):
    """Takes a fixed number of images."""

    def __init__(self, number):
        super().__init__()
        self.fc, self.number = nn.Linear(192, 4), number

    def forward(self, x):
        return self.fc(x.reshape(self.number, 192))


@pytest.mark.parametrize("kind", [Remembering, AlwaysDropping])
def test_a_model_that_answers_differently_each_time_is_refused(kind):
    with pytest.raises(ModelError, match=f"{kind.__name__} answers differently when it is asked again"):
        trace_model(kind().eval(), SHAPE)


@torch.inference_mode()
def test_a_model_whose_answers_depend_on_the_number_of_images_computes_the_same():
    model = Counting().eval()
    traced = trace_model(copy.deepcopy(model), SHAPE)
    for number in (1, 2, 5):
        x = torch.randn(number, *SHAPE)
        torch.testing.assert_close(traced(x), model(x))


@torch.inference_mode()
def test_a_model_may_overwrite_its_images():
    class Centred(nn.Sequential):
        def forward(self, x):
            same = x
            x -= 0.5
            return super().forward(same + x)

    model = Centred(nn.Flatten(), nn.Linear(192, 4)).eval()
    traced, x = trace_model(copy.deepcopy(model), SHAPE), torch.randn(2, *SHAPE)
    torch.testing.assert_close(traced(x.clone()), model(x.clone()))


@pytest.mark.parametrize("number", [1, 3])
def test_a_model_for_a_fixed_number_of_images_is_refused(number):
    with pytest.raises(ModelError, match="InOne"):
        trace_model(InOne(number).eval(), SHAPE)


_AFTER_TRACING = """
import torch
from quantlib.graph.model import trace_model
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 2))
trace_model(net.eval(), (3, 4, 4))
torch.export.export(net, (torch.zeros(2, 3, 4, 4),), strict=True)
"""


def test_what_torch_compiles_after_tracing_still_knows_len():
    subprocess.run([sys.executable, "-c", _AFTER_TRACING], check=True, capture_output=True)
