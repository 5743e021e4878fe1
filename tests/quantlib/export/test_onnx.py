"""The ONNX file: one graph for each architecture, filled in with a model's weights and grids."""

import copy

import pytest
import torch
from torch import nn

from quantlib.errors import ModelError
from quantlib.graph import fusion
from quantlib.graph.model import trace_model
from quantlib.quantize import calibration, conversion, preparation
from quantlib.quantize.grids import Grid
from quantlib.recipe.scheme import Scheme
from quantlib.runtimes import available, classifiers

onnx = pytest.importorskip("onnx", reason="the extra of an ONNX runtime is not installed")
from quantlib.export.onnx import write_onnx  # noqa: E402
from quantlib.export.onnx_draft import draft  # noqa: E402

SHAPE = (3, 32, 32)
# 7 bits of activations: no runtime saturates on any CPU.
SCHEME = Scheme(observer="minmax", weights="per_channel", activation_bits=7)
RUNTIMES = [found.name for found in available.find_runtimes()]
needs_runtime = pytest.mark.skipif(not RUNTIMES, reason="no runtime for ONNX is installed")


class Net(nn.Module):
    """A residual, a layer over tokens, a parameter of its own, and float operations in between."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, stride=8), nn.BatchNorm2d(channels), nn.ReLU())
        self.second, self.third = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        self.position = nn.Parameter(torch.randn(1, 16, channels))
        self.norm, self.tokens, self.head = nn.LayerNorm(channels), nn.Linear(channels, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x)
        x = torch.relu(self.second(x) + self.shortcut(x))
        x = self.third(x).flatten(2).transpose(1, 2) + self.position
        return self.head(nn.functional.gelu(self.tokens(self.norm(x))).mean(1))


def fused(seed, channels=8):
    """The net with weights of its own, fused."""
    torch.manual_seed(seed)
    model = Net(channels)
    model.first[1].running_mean.normal_(0, 0.1)
    return fusion.fuse_model(trace_model(model.eval(), SHAPE), "eval", inplace=True)


def quantized(model, scheme=SCHEME):
    """A fused model, quantized."""
    torch.manual_seed(0)
    observed = preparation.observe(model, preparation.find_layers(model, scheme.float_layers))
    with torch.inference_mode():
        observed(torch.randn(16, *SHAPE))
    calibration.choose_ranges(observed, scheme)
    return conversion.convert(observed, scheme, inplace=True)


def noise(expected, got):
    return float((expected - got).square().sum() / expected.square().sum())


def answers(content, runtime, x, folder):
    """What a file gives for images."""
    (folder / "model.onnx").write_bytes(content)
    return classifiers.open_model(folder / "model.onnx", runtime, num_threads=1)(x)


def initializers(content):
    """The constants of a file, by name."""
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load_from_string(content).graph.initializer}


def rounded(content):
    """The names of the tensors that a file rounds."""
    nodes = onnx.load_from_string(content).graph.node
    return {node.output[0].removesuffix("_int8") for node in nodes if node.op_type == "QuantizeLinear"}


@pytest.fixture(scope="module")
def float_model():
    return fused(1)


@pytest.fixture(scope="module")
def int8_model(float_model):
    return quantized(float_model)


@pytest.fixture(scope="module")
def graph(float_model):
    """The draft that all files here are written from."""
    before = copy.deepcopy(float_model.state_dict())
    content = draft(float_model, SHAPE)
    assert all(torch.equal(value, before[name]) for name, value in float_model.state_dict().items())
    return content


# The draft


def test_the_same_architecture_gives_the_same_draft_whatever_its_weights(graph):
    assert draft(fused(2), SHAPE) == graph


def test_a_draft_holds_no_weights(graph, float_model):
    stored = {each.name: each for each in onnx.load_from_string(graph).graph.initializer}
    state = {name: value for name, value in float_model.state_dict().items() if value.is_floating_point()}
    assert state.keys() <= stored.keys()
    for name, value in state.items():
        assert list(stored[name].dims) == list(value.shape)
        assert not stored[name].raw_data


def test_a_file_that_would_be_too_large_is_refused(graph, float_model, monkeypatch):
    monkeypatch.setattr("quantlib.export.onnx._MAX_SIZE", 1000)

    with pytest.raises(ModelError, match=r"The weights take 0\.0 GB, and an ONNX file holds at most 2 GB"):
        write_onnx(graph, float_model, "onnxruntime")


class Positions(nn.Module):
    """A convolution and a table that is no parameter, which the exporter computes with."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 8, stride=8), nn.Linear(4, 2)
        self.register_buffer("angles", torch.linspace(0, 3, 16))

    def forward(self, x):
        return self.head((self.conv(x).flatten(2) * torch.cos(self.angles)).mean(2))


@needs_runtime
def test_a_constant_that_is_no_weight_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = fusion.fuse_model(trace_model(Positions().eval(), SHAPE), "eval", inplace=True)
    content = write_onnx(draft(model, SHAPE), quantized(model), RUNTIMES[0])

    x = torch.randn(4, *SHAPE)
    assert noise(quantized(model)(x), answers(content, RUNTIMES[0], x, tmp_path)) < 1e-2


@needs_runtime
def test_a_norm_whose_weights_the_exporter_would_compute_with_keeps_them(tmp_path):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    net = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), norm, nn.Flatten(), nn.Linear(64, 2))
    model = fusion.fuse_model(trace_model(net.eval(), SHAPE), "eval", inplace=True)
    content = write_onnx(draft(model, SHAPE), model, RUNTIMES[0])

    x = torch.randn(4, *SHAPE)
    assert noise(model(x).detach(), answers(content, RUNTIMES[0], x, tmp_path)) < 1e-6


class Branching(nn.Module):
    """Its forward depends on the values that it sees."""

    def forward(self, x):
        return 2 * x if bool(x.abs().sum() > 1) else -x


def test_a_model_with_a_module_taken_as_a_whole_is_refused():
    model = trace_model(nn.Sequential(nn.Conv2d(3, 4, 1), Branching()).eval(), SHAPE)

    with pytest.raises(ModelError, match="1 branches on values, and the file would hold one branch"):
        draft(fusion.fuse_model(model, "eval"), SHAPE)


def test_what_onnx_cannot_express_is_refused_in_one_line(capfd):
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.linalg.matrix_exp(self.conv(x) / 1000)

    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ModelError, match=r"cannot be written as ONNX: \S.*$"):
        draft(fusion.fuse_model(trace_model(Unusual().eval(), SHAPE), "eval"), SHAPE)
    assert "".join(capfd.readouterr()) == ""  # torch prints the whole graph.
    assert torch.backends.mha.get_fastpath_enabled() == fast


# The file


@needs_runtime
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_float_file_answers_as_the_model_for_any_number_of_images(graph, float_model, runtime, tmp_path):
    content = write_onnx(graph, float_model, runtime)
    for number in (1, 5):
        x = torch.randn(number, *SHAPE)
        with torch.inference_mode():
            torch.testing.assert_close(answers(content, runtime, x, tmp_path), float_model(x), rtol=1e-3, atol=1e-4)


@needs_runtime
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "scheme",
    [
        SCHEME,
        Scheme(observer="minmax", weights="per_tensor", activation_bits=7),
        Scheme(observer="minmax", weights="per_channel", activation_bits=7, float_layers=("second", "tokens")),
    ],
    ids=["per channel", "per tensor", "some in float"],
)
def test_one_draft_serves_every_scheme_and_the_int8_file_answers_as_the_quantized_model(
    graph, float_model, scheme, runtime, tmp_path
):
    model = quantized(float_model, scheme)
    x = torch.randn(8, *SHAPE)
    content = write_onnx(graph, model, runtime)
    with torch.inference_mode():
        assert noise(model(x), answers(content, runtime, x, tmp_path)) < 0.005


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["float_model", "int8_model"])
def test_a_file_is_plain_onnx_for_any_number_of_images(graph, name, runtime, request):
    content = write_onnx(graph, request.getfixturevalue(name), runtime)
    written = onnx.load_from_string(content)
    onnx.checker.check_model(written)
    assert [(each.domain, each.version) for each in written.opset_import] == [("", 18)]
    assert {node.domain for node in written.graph.node} == {""}
    shapes = [each.type.tensor_type.shape.dim for each in (*written.graph.input, *written.graph.output)]
    assert [each.name for each in (*written.graph.input, *written.graph.output)] == ["images", "logits"]
    assert [shape[0].dim_param for shape in shapes] == ["N", "N"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_file_has_the_same_bytes_each_time_and_the_model_stays_as_it_was(graph, float_model, int8_model, runtime):
    for model in (float_model, int8_model):
        state = copy.deepcopy(model.state_dict())
        assert write_onnx(graph, model, runtime) == write_onnx(graph, copy.deepcopy(model), runtime)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert write_onnx(graph, int8_model, runtime) != write_onnx(graph, float_model, runtime)
    assert b".py" not in write_onnx(graph, int8_model, runtime), "paths of this machine's Python files"


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
def test_weights_of_int8_layers_are_stored_as_int8_and_those_of_float_layers_as_float(graph, float_model, weights):
    scheme = Scheme(observer="minmax", weights=weights, activation_bits=7, float_layers=("second",))
    model = quantized(float_model, scheme)
    content = write_onnx(graph, model, "onnxruntime")
    stored = initializers(content)
    axes = {
        node.input[0]: [each.i for each in node.attribute if each.name == "axis"]
        for node in onnx.load_from_string(content).graph.node
        if node.op_type == "DequantizeLinear"
    }
    layers = {"first.0": 0, "third": 0, "shortcut": 0, "tokens": 1, "head": 0}
    for path, axis in layers.items():
        layer = model.get_submodule(path)
        steps = layer.weight_quantizer.steps(layer.weight.detach()).numpy()
        own = stored[f"{path}.weight_int8"]
        assert own.dtype == "int8"
        # A layer over tokens is a product with its weight transposed.
        assert (own == steps).all() if axis == 0 else (own == steps.T).all()
        assert (stored[f"{path}.weight_scale"] == layer.weight_quantizer.scale.numpy()).all()
        assert axes[f"{path}.weight_int8"] == ([axis] if weights == "per_channel" else [])
        assert f"{path}.weight" not in stored
        assert stored[f"{path}.bias"].dtype == "float32"
    assert (stored["second.weight"] == model.get_submodule("second").weight.detach().numpy()).all()
    assert {name for name in stored if name.endswith(".weight_int8")} == {f"{path}.weight_int8" for path in layers}


def test_each_runtime_rounds_what_it_is_fast_with(graph, int8_model):
    for_ort, for_openvino = (rounded(write_onnx(graph, int8_model, name)) for name in ("onnxruntime", "openvino"))
    grids = {name.removeprefix("quantizers.") for name, m in int8_model.named_modules() if isinstance(m, Grid)}
    grids = {name for name in grids if "weight_quantizer" not in name}

    # ONNX Runtime computes a layer in int8 only if what it gives is rounded, too.
    assert for_ort == grids
    # For OpenVINO, what no int8 layer reads stays float: one side of a sum of two, the position, GELU, and the logits.
    assert grids - for_openvino == {"second", "third", "tokens", "head"}
    assert for_openvino < grids


def test_a_float_file_rounds_nothing(graph, float_model):
    written = onnx.load_from_string(write_onnx(graph, float_model, "onnxruntime"))
    assert not [node for node in written.graph.node if "QuantizeLinear" in node.op_type]
    assert {each.data_type for each in written.graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }


def test_grids_are_stored_as_they_are(graph, int8_model):
    stored = initializers(write_onnx(graph, int8_model, "onnxruntime"))
    grid = int8_model.get_submodule("quantizers.head")
    assert stored["head_scale"] == grid.scale.numpy()
    assert stored["head_zero_point"] == grid.zero_point.numpy()
    assert stored["head_zero_point"].dtype == "uint8"


def test_the_draft_of_another_model_is_refused(graph):
    with pytest.raises(ModelError, match=r"The graph's [\w.]+ is of another model"):
        write_onnx(graph, fused(1, channels=16), "onnxruntime")
