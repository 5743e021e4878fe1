"""The ends of an exported file: it may normalize pixels itself, and may give probabilities."""

import pytest
import torch
from schemes import scheme

from quantlib.data import shards
from quantlib.data.feeding import feed
from quantlib.data.normalization import Normalization
from quantlib.errors import ModelError
from quantlib.export import check, executorch, onnx_draft, scripting, torch_export
from quantlib.export.ends import Ends
from quantlib.measure import evaluation
from quantlib.quantize import conversion
from quantlib.recipe.interface import FLOAT, Interface
from quantlib.runtimes import available, classifiers

SHAPE = (3, 32, 32)
ONNX_RUNTIMES = [found.name for found in available.find_runtimes()]
PROGRAMS = {"torch_export": torch_export.write, "executorch": executorch.write}
RUNTIMES = ["torchscript", *filter(available.is_installed, PROGRAMS), *ONNX_RUNTIMES]
PIXELS = [Interface(input="uint8", layout=layout) for layout in ("nchw", "nhwc")]
PROBABILITIES = Interface(softmax=True)
EVERYTHING = Interface(input="uint8", layout="nhwc", softmax=True)


@pytest.fixture(scope="module")
def models(calibrated, fused_model):
    """The trained net, float and int8; read-only."""
    return {"float": fused_model, "int8": conversion.convert(calibrated("accurate"), scheme("accurate"))}


@pytest.fixture(scope="module")
def write(models, val_shard, tmp_path_factory):
    """Writes a model's file: (path, the runtime's full name)."""
    normalization = shards.open_shard(val_shard).normalization
    folder = tmp_path_factory.mktemp("files")
    draft = onnx_draft.draft(models["float"], SHAPE) if ONNX_RUNTIMES else b""

    def write(kind, runtime, interface):
        ends = Ends(interface, normalization)
        name = f"{kind}-{runtime}-{interface.input}-{interface.layout}-{interface.softmax}"
        if runtime == "torchscript":
            engine = None if kind == "float" else available.default_engine()
            path, runtime = folder / f"{name}.pt", available.torchscript_on(engine)
            path.write_bytes(scripting.script(models[kind], engine, SHAPE, ends))
        elif runtime in PROGRAMS:
            path = folder / f"{name}{available.suffix_of(runtime)}"
            path.write_bytes(PROGRAMS[runtime](models[kind], SHAPE, ends))
        else:
            from quantlib.export import onnx

            path = folder / f"{name}.onnx"
            path.write_bytes(ends.add_to_onnx(onnx.write_onnx(draft, models[kind], runtime)))
        return path, runtime

    return write


def answers(path, runtime, shard, interface):
    """What a file answers to the images of a shard."""
    images = shards.open_shard(shard)
    model = classifiers.open_model(path, runtime, num_threads=1)
    return model(feed(images.pixels, images.normalization, interface))


@pytest.mark.parametrize("interface", PIXELS, ids=lambda each: each.layout)
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_file_for_pixels_answers_as_the_one_for_normalized_images(kind, runtime, interface, write, val_shard):
    expected = answers(*write(kind, runtime, FLOAT), val_shard, FLOAT)
    got = answers(*write(kind, runtime, interface), val_shard, interface)
    # OpenVINO multiplies by what the file divides by: the last bit of a float may differ.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 if runtime == "openvino" else 0)


@pytest.mark.parametrize("interface", [PROBABILITIES, EVERYTHING], ids=lambda each: each.input)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_with_softmax_gives_the_probabilities_of_its_logits(runtime, interface, write, val_shard):
    expected = answers(*write("int8", runtime, FLOAT), val_shard, FLOAT).softmax(1)
    got = answers(*write("int8", runtime, interface), val_shard, interface)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_is_checked_and_evaluated_on_what_it_takes(runtime, write, models, val_shard):
    path, full_name = write("int8", runtime, EVERYTHING)
    check.check_file(path.read_bytes(), models["int8"], full_name, val_shard, EVERYTHING)
    found = evaluation.evaluate_file(path, full_name, val_shard, 5, interface=EVERYTHING)
    expected = evaluation.evaluate_file(*write("int8", runtime, FLOAT), val_shard, 5)
    assert (found.top5 == expected.top5).all()
    torch.testing.assert_close(torch.from_numpy(found.loss), torch.from_numpy(expected.loss))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_normalizes_wrongly_is_refused(runtime, write, models, val_shard):
    other = Ends(EVERYTHING, Normalization((0.1, 0.2, 0.3), (0.5, 0.5, 0.5)))
    if runtime == "torchscript":
        content, full_name = scripting.script(models["float"], None, SHAPE, other), runtime
    elif runtime in PROGRAMS:
        content, full_name = PROGRAMS[runtime](models["float"], SHAPE, other), runtime
    else:
        path, full_name = write("float", runtime, FLOAT)
        content = other.add_to_onnx(path.read_bytes())
    with pytest.raises(ModelError, match="of their power away from the model's own"):
        check.check_file(content, models["float"], full_name, val_shard, EVERYTHING)


def test_a_torchscript_file_for_pixels_refuses_images_that_are_normalized_already(write, val_inputs):
    path, _ = write("float", "torchscript", PIXELS[0])
    with pytest.raises(torch.jit.Error, match=r"This file takes uint8 pixels\."):
        torch.jit.load(path)(val_inputs)


def test_the_same_model_with_the_same_ends_gives_the_same_bytes(models, write):
    before = write("int8", "torchscript", EVERYTHING)[0].read_bytes()
    scripting.script(models["float"], None, SHAPE)
    assert write("int8", "torchscript", EVERYTHING)[0].read_bytes() == before
