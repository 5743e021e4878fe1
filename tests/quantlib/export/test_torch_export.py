"""The file of torch.export: float operations, and quantized_decomposed ones where the model rounds."""

import copy
import io
import json
from pathlib import Path

import exported
import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib import api
from quantlib.errors import ModelError
from quantlib.export import archive, torch_export
from quantlib.graph.fusion import fuse_model
from quantlib.graph.model import trace_model
from quantlib.models import exported_file, exported_graph, quantized_decomposed
from quantlib.quantize import conversion
from quantlib.runtimes import classifiers

SHAPE = (3, 32, 32)
ROUNDING = "torch.ops.quantized_decomposed"


@pytest.fixture(scope="module")
def models(calibrated, fused_model):
    """The trained net, float and int8 per channel and per tensor; read-only."""
    made = {name: conversion.convert(calibrated(name), scheme(name)) for name in ("accurate", "default")}
    return {"float": fused_model, **made}


@pytest.fixture(scope="module")
def write(models, tmp_path_factory):
    """Writes a model's file, once."""
    folder = tmp_path_factory.mktemp("files")

    def write(name):
        path = folder / f"{name}.pt2"
        if not path.exists():
            path.write_bytes(torch_export.write(models[name], SHAPE))
        return path

    return write


def noise(expected, got):
    return float((expected - got).square().sum() / expected.square().sum())


def operations(path):
    """What a file's graph does, in order: (operation, names of the tensors that it reads, name of what it gives)."""
    nodes = exported.read_json(path, "models/model.json")["graph_module"]["graph"]["nodes"]
    return [
        (
            node["target"].removesuffix(".default"),
            [each["arg"]["as_tensor"]["name"] for each in node["inputs"] if "as_tensor" in each["arg"]],
            node["outputs"][0].get("as_tensor", {}).get("name"),
        )
        for node in nodes
    ]


@pytest.mark.parametrize("name", ["float", "accurate", "default"])
def test_a_file_answers_as_its_model_for_any_number_of_images(write, models, name, val_inputs):
    model = classifiers.open_model(write(name), "torch_export")
    for x in (val_inputs[:1], val_inputs, torch.cat([val_inputs, val_inputs])):
        with torch.inference_mode():
            expected = models[name](x)
        assert noise(expected, model(x)) < 1e-6


@pytest.mark.parametrize("name", ["float", "accurate"])
def test_torchs_own_loader_gives_the_same_bits(write, name, val_inputs):
    quantized_decomposed.operations()
    loaded = torch.export.load(write(name)).module()
    with torch.no_grad():
        model = classifiers.open_model(write(name), "torch_export")
        for x in (val_inputs[:1], val_inputs):
            assert torch.equal(loaded(model.arrange(x)), model(x))


def test_weights_are_stored_as_int8_and_activations_are_dequantized_for_each_reader(write, models):
    state = exported_file.read_state(str(write("accurate")))
    layers = [path for path, module in models["accurate"].named_modules() if hasattr(module, "weight_quantizer")]
    assert layers
    assert all(state[f"{path}.weight"].dtype == torch.int8 for path in layers)
    found = operations(write("accurate"))
    rounded = {gives for kind, _, gives in found if kind == f"{ROUNDING}.quantize_per_tensor"}
    read = {reads[0]: gives for kind, reads, gives in found if kind == f"{ROUNDING}.dequantize_per_tensor"}
    assert rounded == read.keys()
    *values, logits = [gives for kind, _, gives in found if kind.startswith(f"{ROUNDING}.dequantize")]
    assert found[-1][2] == logits
    assert [sum(value in reads for _, reads, _ in found) for value in values] == [1] * len(values)
    assert not any(kind.startswith(ROUNDING) for kind, _, _ in operations(write("float")))


def test_the_same_model_gives_the_same_bytes_without_pickles_and_paths_of_this_machine(write, models):
    content = write("accurate").read_bytes()
    assert torch_export.write(copy.deepcopy(models["accurate"]), SHAPE) == content
    records = archive.read(content)
    assert records["data/sample_inputs/model.pt"] == b""
    assert not any(str(Path(__file__).parents[3]).encode() in record for record in records.values())
    described = [json.loads(record)["config"] for name, record in records.items() if name.endswith("_config.json")]
    assert len(described) == 2
    assert not any(each["use_pickle"] for config in described for each in config.values())
    named = {f"data/weights/{each['path_name']}" for config in described for each in config.values()}
    assert {name for name in records if name.startswith("data/weights/weight_")} == named


class Carrying(nn.Module):
    """Operations that carry int8 values to a convolution: a maximum, and a part of the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        kept, _ = nn.functional.max_pool2d(self.stem(x).relu(), 2).chunk(2, dim=1)
        return self.head(self.conv(kept).mean((2, 3)))


def test_what_an_operation_carries_is_rounded_again_before_a_layer_and_stays_as_it_is(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, *SHAPE)
    quantized = api.quantize(Carrying().eval(), [x])
    quantized.save(tmp_path / "net.pt2")
    found = operations(tmp_path / "net.pt2")
    rounding = {gives for kind, _, gives in found if kind == f"{ROUNDING}.dequantize_per_tensor"}
    read = [reads[0] for kind, reads, _ in found if kind.startswith(("torch.ops.aten.conv", "torch.ops.aten.linear"))]
    assert len(read) == 3
    assert set(read) <= rounding
    assert noise(quantized(x), api.load(tmp_path / "net.pt2")(x)) < 1e-6


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_loading_a_file_runs_no_code_that_somebody_put_into_it(write, tmp_path, val_inputs):
    path, harmed = tmp_path / "net.pt2", tmp_path / "harmed"
    path.write_bytes(write("accurate").read_bytes())
    buffer = io.BytesIO()
    torch.save((Attack(harmed),), buffer)
    saved = exported.read_json(path, "models/model.json")
    sizes = saved["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = f"open({str(harmed)!r}, 'w')"
    exported.alter(path, {"data/sample_inputs/model.pt": buffer.getvalue(), "models/model.json": saved})
    expected = classifiers.open_model(write("accurate"), "torch_export")(val_inputs)
    assert torch.equal(api.load(path)(val_inputs), expected)
    assert not harmed.exists()


def test_a_quantized_file_is_no_model_to_quantize(write):
    with pytest.raises(ModelError, match=r"quantize_per_tensor\.default', which is not torch's own"):
        exported_graph.build(exported_file.read_program(str(write("accurate"))))


class Deciding(nn.Module):
    """Branches on what it sees."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) if bool(x.sum() > 0) else x


class Net(nn.Module):
    """A classifier around a module that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 3, 3), Deciding(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.inner(self.conv(x).mean((2, 3))))


def test_a_model_that_branches_on_values_is_refused_with_the_reason():
    torch.manual_seed(0)
    fused = fuse_model(trace_model(Net().eval(), SHAPE), "eval")
    with pytest.raises(ModelError, match=r"The model cannot be exported by torch\.export: .*data-dependent"):
        torch_export.write(fused, SHAPE)


class Attention(nn.Module):
    """Attention as torch has it, which is taken as a whole."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, 2)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.head(self.block(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


def test_attention_that_is_taken_as_a_whole_is_written_layer_by_layer(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, *SHAPE)
    quantized = api.quantize(Attention().eval(), [x])
    assert {layer.path: layer.int8 for layer in quantized.layers}["block.linear1"]
    quantized.save(tmp_path / "net.pt2")
    assert noise(quantized(x), api.load(tmp_path / "net.pt2")(x)) < 1e-4
