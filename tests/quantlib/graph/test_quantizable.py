"""A model as it is, made quantizable: the same answers and parameters, and int8 wherever it pays."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from schemes import SCHEDULE
from torch import nn
from torchvision import models

from quantlib.data.transforms import TrainTransform
from quantlib.eager.modules import DeQuantStub, QuantStub
from quantlib.errors import ModelError
from quantlib.export import onnx
from quantlib.graph import fusion
from quantlib.graph.quantizable import make_quantizable, plan_of
from quantlib.quantize import conversion, preparation, qat, simulation
from quantlib.recipe.scheme import Scheme

SCHEME = Scheme(observer="minmax", weights="per_channel", activation_bits=8)


def settled(model, shape):
    """With statistics in BatchNorm, so that activations keep their size."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(8, *shape))
    return model.eval()


def stubs(model):
    return sum(isinstance(m, QuantStub) for m in model.modules()), sum(
        isinstance(m, DeQuantStub) for m in model.modules()
    )


def quantized(model, shape, engine, mode="eval"):
    """Its simulation and its int8 model, calibrated on noise, and the noise."""
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    fused = fusion.fuse_model(make_quantizable(copy.deepcopy(model), shape), mode)
    prepared = preparation.prepare(fused, SCHEME, mode)
    with torch.no_grad():
        prepared(x)
    return simulation.simulate(prepared, mode, "both"), conversion.convert(prepared, engine), x


def noise(expected, got):
    return float((expected - got).square().sum() / expected.square().sum())


# Architectures


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [
        ("resnet18", 32, 1.0),
        ("mobilenet_v2", 32, 1.0),
        ("mobilenet_v3_small", 32, 0.95),
        ("efficientnet_b0", 32, 0.95),
        ("regnet_y_400mf", 32, 0.95),
        ("shufflenet_v2_x0_5", 32, 1.0),
        ("densenet121", 32, 1.0),
        ("squeezenet1_1", 32, 1.0),
        ("googlenet", 32, 1.0),
    ],
)
def test_a_classifier_of_torchvision_is_quantized_as_it_is(name, size, least, engine):
    torch.manual_seed(0)
    extra = {"init_weights": True} if name == "googlenet" else {}
    shape = (3, size, size)
    model = settled(models.get_model(name, num_classes=10, **extra), shape)
    layers = plan_of(model, shape).layers
    total = sum(layer.num_multiplications for layer in layers)
    simulated, int8, x = quantized(model, shape, engine)
    with torch.inference_mode():
        expected, answers = model(x), simulated(x)
        assert noise(expected, answers) < 0.3
        assert noise(answers, int8(x)) < 0.1
    assert sum(layer.num_multiplications for layer in layers if layer.int8) >= least * total


def test_the_gates_of_squeeze_and_excite_stay_float_and_a_head_on_one_pixel_does_not():
    gated = plan_of(models.mobilenet_v3_small(num_classes=10).eval(), (3, 32, 32)).layers
    assert {layer.path.split(".")[-1] for layer in gated if not layer.int8} == {"fc1", "fc2"}
    assert all("squeeze-and-excite" in layer.reason for layer in gated if not layer.int8)
    # At 32 pixels, the last stage of ResNet-18 sees one pixel.
    assert all(layer.int8 for layer in plan_of(models.resnet18(num_classes=10).eval(), (3, 32, 32)).layers)


def test_a_transformer_is_quantized_between_its_attention():
    torch.manual_seed(0)
    vit = models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval()
    layers = {layer.path for layer in plan_of(vit, (3, 32, 32)).layers if layer.int8}
    assert layers == {"conv_proj", "heads.head"} | {
        f"encoder.layers.encoder_layer_{n}.mlp.{m}" for n in (0, 1) for m in (0, 3)
    }


# The same model


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_parameters_keep_their_names_and_a_second_build_is_the_same(name):
    torch.manual_seed(0)
    model = models.get_model(name, num_classes=10).eval()
    names = list(model.state_dict())
    first, second = (make_quantizable(copy.deepcopy(model), (3, 32, 32)) for _ in range(2))
    assert [key for key in first.state_dict() if key in names] == names
    assert first.state_dict().keys() == second.state_dict().keys()
    assert [n for n, _ in first.named_modules()] == [n for n, _ in second.named_modules()]
    assert first.code == second.code


def test_a_model_with_stubs_of_its_own_is_taken_as_it_is(tiny_model):
    assert make_quantizable(tiny_model, (3, 32, 32)) is tiny_model


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="nothing to quantize"):
        make_quantizable(nn.Sequential(nn.Flatten(), nn.ReLU()), (3, 8, 8))


# Borders


class Residual(nn.Module):
    """A shared ReLU, a sum, functions in place of modules, and a sum in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = torch.nn.functional.relu(self.second(x))
        y = self.relu(y + x)
        y += self.third(y)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))


def test_one_region_has_one_border_on_each_side(engine):
    torch.manual_seed(0)
    model = Residual().eval()
    quantizable = make_quantizable(copy.deepcopy(model), (3, 8, 8))
    assert stubs(quantizable) == (1, 1)
    assert sorted(fusion.find_groups(quantizable)) == [["first", "relu"], ["second", "relu_1"]]
    simulated, int8, x = quantized(model, (3, 8, 8), engine)
    with torch.inference_mode():
        assert noise(model(x), simulated(x)) < 0.01
        assert noise(simulated(x), int8(x)) < 0.01


class Branching(nn.Module):
    """Its forward depends on the values that it sees."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def test_a_module_that_cannot_be_traced_stays_float_and_the_rest_is_int8(engine):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Branching(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 4)
    ).eval()
    layers = plan_of(model, (3, 8, 8)).layers
    assert [layer.path for layer in layers if layer.int8] == ["0", "3", "5"]
    assert [(layer.path, layer.reason) for layer in layers if not layer.int8] == [
        ("2.conv", "2 branches on values, and is taken as a whole")
    ]
    simulated, int8, x = quantized(model, (3, 8, 8), engine)
    with torch.inference_mode():
        assert noise(model(x), simulated(x)) < 0.01
        assert noise(simulated(x), int8(x)) < 0.01
    with pytest.raises(ModelError, match="2 branches on values, and the file would hold one branch"):
        onnx.to_onnx(int8, (3, 8, 8))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) if float(x.sum()) > 0 else self.conv(x).amax((2, 3))


def test_a_model_that_cannot_be_traced_is_refused():
    with pytest.raises(ModelError, match=r"Branches cannot be traced.*QuantStub and DeQuantStub"):
        make_quantizable(Branches().eval(), (3, 8, 8))


class Remembering(nn.Module):
    """Adds the number of images that it saw when it was first called."""

    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(192, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x.flatten(1)) + self.calls


def test_a_model_that_computes_something_else_once_traced_is_refused():
    with pytest.raises(ModelError, match="Remembering computes something else once it is traced"):
        make_quantizable(Remembering().eval(), (3, 8, 8))


def test_float_operations_between_layers_have_borders_around_them():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 4)).eval()
    assert stubs(make_quantizable(model, (3, 8, 8))) == (2, 2)


def test_a_layer_that_runs_twice_is_not_fused_and_computes_the_same(engine):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(torch.relu(self.conv(x)))).flatten(1))

    torch.manual_seed(0)
    model = Twice().eval()
    assert fusion.find_groups(make_quantizable(copy.deepcopy(model), (3, 8, 8))) == []
    simulated, int8, x = quantized(model, (3, 8, 8), engine)
    with torch.inference_mode():
        assert noise(model(x), simulated(x)) < 0.01
        assert noise(simulated(x), int8(x)) < 0.02


def test_depth_and_dropout_are_left_out_in_evaluation_and_random_in_training():
    torch.manual_seed(0)
    model = make_quantizable(models.efficientnet_b0(num_classes=10).eval(), (3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert not torch.equal(model(x), model(x))


def test_batch_norm_that_stands_alone_is_frozen_as_the_fused_are(train_split):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),  # As in DenseNet: before a convolution, not behind one.
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    fused = fusion.fuse_model(make_quantizable(settled(model, (3, 32, 32)), (3, 32, 32)), "qat")
    prepared = preparation.prepare(fused, SCHEME, "qat")
    before = {name: value.clone() for name, value in prepared.state_dict().items() if "running" in name}
    schedule = replace(SCHEDULE, freeze_batch_norm_after_epoch=-2, freeze_observer_after_epoch=0)
    transform = TrainTransform(crop=(32, 32), scale=(0.5, 1.0), flip=0.5)
    qat.train_epoch(prepared, 0, schedule, train_split, np.arange(len(train_split)), transform)
    after = prepared.state_dict()
    assert len(before) == 4
    assert all(torch.equal(after[name], value) for name, value in before.items())
