"""Exported models: the same answers and the same plan as the model that was exported, for any number of images."""

import json

import exported
import pytest
import torch
from torch import nn
from torchvision import models, ops
from torchvision.models.vision_transformer import VisionTransformer

from quantlib import api
from quantlib.errors import ModelError
from quantlib.graph.model import plan_of, trace_model
from quantlib.graph.plan import share_of_int8
from quantlib.models import checkpoint, exported_graph, registry
from quantlib.models.exported_file import read_program
from quantlib.models.source import ModelInput
from quantlib.quantize import stored

SHAPE = (3, 32, 32)


class ConvNeXt(nn.Module):
    """Its block."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale, self.head = nn.Parameter(torch.full((8, 1, 1), 0.5)), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + self.scale * self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def _small():
    """As torchvision writes its models, with operations that overwrite their input."""
    return nn.Sequential(
        ops.Conv2dNormActivation(3, 8, stride=2, activation_layer=nn.Hardswish),
        ops.SqueezeExcitation(8, 4),
        ops.Conv2dNormActivation(8, 8, groups=8, activation_layer=nn.ReLU6),
        ops.Conv2dNormActivation(8, 16, 1, activation_layer=nn.SiLU),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64, 10),
    )


NETS = {
    "small": _small,
    "resnet18": lambda: models.resnet18(num_classes=10),
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=10),
    "vit": lambda: VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=10),
    "convnext": ConvNeXt,
    "swin": lambda: models.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=10),
}


@pytest.fixture
def make_net(stir_batch_norm):
    """Makes a net whose answers depend on all of it."""

    def make(name):
        torch.manual_seed(0)
        net = NETS[name]()
        for parameter in net.parameters():
            if not parameter.any():  # ViT's last layer starts as zeros, and would hide everything before.
                nn.init.normal_(parameter, std=0.3)
        return stir_batch_norm(net).eval()

    return make


def _load(path, num_classes=10, weights=""):
    source = ModelInput("file:", "{}", weights, fingerprint="", code="", file=str(path))
    model, header = registry.from_input(source, num_classes, SHAPE, seed=0)
    registry.check_logits(model, num_classes, SHAPE)
    return model, header


def _assert_same_answers(model, net, num_images=(1, 3)):
    x = torch.randn(max(num_images), *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for count in num_images:
            expected = net(x[:count].clone())
            assert expected.std() > 1e-3
            torch.testing.assert_close(model(x[:count].clone()), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def _int8_layers(plan):
    return {layer.path for layer in plan.layers if layer.int8}


@pytest.mark.parametrize("any_number", [True, False], ids=["any number", "batch of 1"])
@pytest.mark.parametrize("name", NETS)
def test_an_exported_model_gives_the_same_answers_and_becomes_int8_in_the_same_layers(
    make_net, tmp_path, name, any_number
):
    net = make_net(name)
    model, _ = _load(exported.write(net, tmp_path / "net.pt2", any_number=any_number))

    _assert_same_answers(model, net)
    _assert_same_answers(trace_model(model, SHAPE), net)
    own, expected = plan_of(model, SHAPE), plan_of(net, SHAPE)
    assert len(own.int8) == len(expected.int8)
    assert _int8_layers(own) == _int8_layers(expected)
    assert share_of_int8(own.layers) == pytest.approx(share_of_int8(expected.layers))
    assert share_of_int8(own.layers) > 0.5


@pytest.mark.parametrize("any_number", [True, False], ids=["any number", "batch of 1"])
@pytest.mark.parametrize("name", ["small", "resnet18", "convnext"])
def test_a_decomposed_model_has_the_same_int8_layers(make_net, tmp_path, name, any_number):
    net = make_net(name)
    path = exported.write(net, tmp_path / "net.pt2", any_number=any_number, decompose=True)
    model, _ = _load(path)

    _assert_same_answers(model, net)
    assert _int8_layers(plan_of(model, SHAPE)) == _int8_layers(plan_of(net, SHAPE))


def test_decomposed_attention_answers_several_images_after_export_for_one(make_net, tmp_path):
    net = make_net("vit")
    model, _ = _load(exported.write(net, tmp_path / "net.pt2", any_number=False, decompose=True))

    _assert_same_answers(model, net)


@pytest.mark.parametrize("decompose", [False, True])
def test_a_model_exported_in_training_mode_answers_as_in_eval_mode(make_net, tmp_path, decompose):
    net = make_net("resnet18").train()
    model, _ = _load(exported.write(net, tmp_path / "net.pt2", decompose=decompose))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    _assert_same_answers(model, net.eval())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_and_dropout_are_modules_that_train(make_net, tmp_path):
    net = make_net("small")
    traced = trace_model(_load(exported.write(net, tmp_path / "net.pt2"))[0], SHAPE)

    norms = {name: module for name, module in traced.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms.keys() == {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert [module.p for module in traced.modules() if isinstance(module, nn.Dropout)] == [0.2]
    before = norms["0.1"].running_mean.clone()
    traced.train()(torch.randn(4, *SHAPE))
    assert not torch.equal(norms["0.1"].running_mean, before)


def test_parameters_keep_their_names_and_take_a_weights_file(make_net, tmp_path):
    path = exported.write(make_net("swin"), tmp_path / "net.pt2")
    torch.manual_seed(9)
    other = NETS["swin"]().eval()
    torch.save(other.state_dict(), tmp_path / "other.pth")

    model, _ = _load(path, weights=str(tmp_path / "other.pth"))

    assert other.state_dict().keys() <= model.state_dict().keys()
    _assert_same_answers(model, other)


def test_weights_of_another_model_are_refused(make_net, tmp_path):
    path = exported.write(make_net("convnext"), tmp_path / "net.pt2")
    torch.save({"extra": torch.zeros(1)}, tmp_path / "other.pth")

    with pytest.raises(ModelError, match=r"do not fit the architecture: .*1 unknown \(extra\)"):
        _load(path, weights=str(tmp_path / "other.pth"))


def test_a_stored_model_is_opened_without_the_file(make_net, tmp_path):
    net = make_net("vit")
    model, header = _load(exported.write(net, tmp_path / "net.pt2", any_number=False))
    content = checkpoint.save(trace_model(model, SHAPE), header)
    (tmp_path / "net.pt2").unlink()

    opened, _ = stored.open_model(content)

    assert str(tmp_path).encode() not in content
    _assert_same_answers(opened, net)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torchscript"])
def test_attention_is_written_for_runtimes_and_trained(make_net, tmp_path, runtime):
    net = make_net("vit")
    model, _ = _load(exported.write(net, tmp_path / "net.pt2", any_number=False))
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    quantized = api.quantize(model, [x])
    path = tmp_path / ("int8.onnx" if runtime == "onnxruntime" else "int8.pt")
    quantized.save(path, runtime)

    expected = quantized(x)
    assert (api.load(path, runtime)(x) - expected).abs().max() < 0.1 * expected.abs().max()
    trainable = quantized.trainable()
    trainable(x).sum().backward()
    (weight,) = (value for name, value in trainable.named_parameters() if name.endswith("in_proj.weight"))
    assert weight.grad.abs().sum() > 0


# What is refused


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ConvNeXt()

    def forward(self, x, y):
        return self.net(x + y)


class TwoAnswers(ConvNeXt):
    def forward(self, x):
        return super().forward(x), x


class Together(ConvNeXt):
    """Its answer depends on what else is in the batch."""

    def forward(self, x):
        logits = super().forward(x)
        return logits - logits.mean(0)


class CountsOne(ConvNeXt):
    def forward(self, x):
        return super().forward(x).reshape(10)[None]


class Noisy(ConvNeXt):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_two_inputs_are_refused(tmp_path):
    images = torch.zeros(2, *SHAPE)
    torch.export.save(torch.export.export(Pair(), (images, images)), tmp_path / "net.pt2")

    with pytest.raises(ModelError, match="takes 2 inputs: it must take one, images"):
        _load(tmp_path / "net.pt2")


def test_an_input_that_is_no_image_is_refused(tmp_path):
    path = exported.write(nn.Linear(8, 10), tmp_path / "net.pt2", images=torch.zeros(2, 8))

    with pytest.raises(ModelError, match="takes a tensor of 2 dimensions: it must take images"):
        _load(path)


def test_two_outputs_are_refused(tmp_path):
    with pytest.raises(ModelError, match="gives 2 outputs: it must give one, logits"):
        _load(exported.write(TwoAnswers(), tmp_path / "net.pt2"))


def test_the_size_it_was_exported_for_is_told(tmp_path):
    path = exported.write(ConvNeXt(), tmp_path / "net.pt2", images=torch.zeros(2, 3, 48, 64))

    with pytest.raises(ModelError, match=r"32 x 32 pixels in 3 channels: it was exported for .*\[3 x 48 x 64\]"):
        _load(path)


def test_a_size_that_was_left_open_takes_any_crop(tmp_path):
    net, dim = ConvNeXt().eval(), torch.export.Dim.DYNAMIC
    images = torch.zeros(2, 3, 64, 48)
    program = torch.export.export(net, (images,), dynamic_shapes=({0: dim, 2: dim, 3: dim},))
    torch.export.save(program, tmp_path / "net.pt2")

    _assert_same_answers(_load(tmp_path / "net.pt2")[0], net)


def test_another_number_of_classes_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"gives \[1, 10\] for one image, and the data has 7 classes"):
        _load(exported.write(ConvNeXt(), tmp_path / "net.pt2"), num_classes=7)


@pytest.mark.parametrize("kind", [Together, CountsOne])
def test_a_fixed_batch_that_cannot_change_is_told_with_what_to_do(tmp_path, kind):
    path = exported.write(kind().eval(), tmp_path / "net.pt2", any_number=False)

    with pytest.raises(ModelError, match=r"exported for a fixed batch of 1, and .*dynamic_shapes=.*Dim\.DYNAMIC"):
        _load(path)


def test_what_is_random_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"aten\.randn_like\.default', which is random"):
        _load(exported.write(Noisy(), tmp_path / "net.pt2"))


def _altered(tmp_path, change):
    path = exported.write(ConvNeXt().eval(), tmp_path / "net.pt2")
    program = json.loads(read_program(path))
    change(program)
    return json.dumps(program)


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.from_file.default", "torch.ops.aten.no_such.default", "torch.ops.mine.op.default", "os.system"],
)
def test_an_operation_that_is_not_torchs_own_or_reads_files_is_refused(tmp_path, target):
    def change(program):
        program["graph"]["nodes"][0]["target"] = target

    with pytest.raises(ModelError, match=f"holds the operation '{target}', which is not"):
        exported_graph.build(_altered(tmp_path, change))


@pytest.mark.parametrize(
    "name", ['head.x"); open("ran", "w"); ("', "head.x;open('ran', 'w')", "head.bäd", "head..x", ""]
)
def test_a_name_that_could_be_code_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    def change(program):
        program["signature"]["input_specs"][0]["parameter"]["parameter_name"] = name

    with pytest.raises(ModelError, match="names may have letters, digits, _ and dots"):
        exported_graph.build(_altered(tmp_path, change))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["forward", "if", "training", "scale.x"])
def test_a_name_that_is_taken_is_refused(tmp_path, name):
    def change(program):
        program["signature"]["input_specs"][1]["parameter"]["parameter_name"] = name

    with pytest.raises(ModelError, match="cannot be understood"):
        exported_graph.build(_altered(tmp_path, change))
