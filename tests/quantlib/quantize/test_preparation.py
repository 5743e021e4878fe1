"""Preparation: what is put into a fused model, and where."""

import copy
import io
from functools import cache

import pytest
import torch
from torch import nn

from quantlib.errors import ModelError
from quantlib.export import native, scripting
from quantlib.graph.fusion import ConvBatchNorm2d, fuse_model
from quantlib.graph.model import trace_model
from quantlib.graph.plan import draw_plan
from quantlib.models import mobilenet_v2
from quantlib.quantize import preparation
from quantlib.quantize.calibration import choose_ranges
from quantlib.quantize.conversion import convert
from quantlib.quantize.fake_quantization import ActivationFakeQuantize, WeightFakeQuantize
from quantlib.quantize.grids import Grid
from quantlib.quantize.layers import QuantizedConv2d, QuantizedLinear
from quantlib.quantize.preparation import find_layers, int8_layers, observe, prepare_qat, quantizers, round_activations
from quantlib.quantize.statistics import ActivationStatistics
from quantlib.recipe.scheme import Scheme
from quantlib.runtimes.engine import use_engine

SHAPE = (3, 16, 16)
SETTING = [[1, 8, 1, 1], [3, 8, 2, 2]]
LAYERS = [
    "features.0.0",
    "features.1.conv.0.0", "features.1.conv.1",
    "features.2.conv.0.0", "features.2.conv.1.0", "features.2.conv.2",
    "features.3.conv.0.0", "features.3.conv.1.0", "features.3.conv.2",
    "features.4.0",
    "classifier.1",
]  # fmt: skip


def scheme(**options):
    return Scheme(**{"observer": "minmax", "weights": "per_channel", "activation_bits": 8, **options})


def _fused(net, mode, shape=SHAPE):
    return fuse_model(trace_model(net.eval(), shape), mode, inplace=True)


@cache
def _built_once(mode):
    torch.manual_seed(0)
    net = mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING)
    return _fused(net, mode)


def _tiny(mode):
    return copy.deepcopy(_built_once(mode))


@pytest.fixture
def fused():
    return _tiny("eval")


@pytest.fixture
def trainable():
    return _tiny("qat")


PREPARE = {
    "observe": lambda model, own, **options: observe(model, own.float_layers, **options),
    "round_activations": round_activations,
    "prepare_qat": prepare_qat,
}


@pytest.fixture(params=PREPARE)
def prepare(request):
    """Each way to prepare a model, with a model that is fused for it."""
    return PREPARE[request.param], _tiny("qat" if request.param == "prepare_qat" else "eval")


def _images(count=4, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def _outputs(model, x, names):
    """What the nodes of these names give."""
    found = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Record(model).run(x)
    return [found[name] for name in names]


class Branch(nn.Module):
    """A ReLU whose input something else reads, one that is alone with it, and one behind no layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.shared, self.alone, self.clip, self.behind_sum = nn.ReLU(), nn.ReLU(), nn.ReLU6(), nn.ReLU()

    def forward(self, x):
        x = self.first(x)
        y = self.alone(self.second(self.shared(x)))
        return self.clip(self.last(self.behind_sum(x + y)))


# What is put in


@pytest.mark.parametrize(
    ("name", "kind"),
    [("observe", ActivationStatistics), ("round_activations", Grid), ("prepare_qat", ActivationFakeQuantize)],
)
def test_each_tensor_that_the_plan_rounds_gets_a_quantizer_of_its_own(name, kind):
    model = _tiny("qat" if name == "prepare_qat" else "eval")
    names = [f"quantizers.{node.name}" for node in draw_plan(model).rounded]

    prepared = PREPARE[name](model, scheme())

    found = quantizers(prepared)
    assert list(found) == names
    assert names == [
        "quantizers.x", "quantizers.features_0_2",
        "quantizers.features_1_conv_0_2", "quantizers.features_1_conv_1", "quantizers.add",
        "quantizers.features_2_conv_0_2", "quantizers.features_2_conv_1_2", "quantizers.features_2_conv_2",
        "quantizers.features_3_conv_0_2", "quantizers.features_3_conv_1_2", "quantizers.features_3_conv_2",
        "quantizers.add_1",
        "quantizers.features_4_2", "quantizers.classifier_0", "quantizers.classifier_1",
    ]  # fmt: skip
    assert {type(each) for each in found.values()} == {kind}
    assert len({id(each) for each in found.values()}) == len(names)


def test_every_layer_of_a_prepared_model_computes_in_int8_in_the_order_of_the_calls(prepare):
    put_in, model = prepare

    prepared = put_in(model, scheme())

    assert int8_layers(prepared) == LAYERS
    assert int8_layers(copy.deepcopy(prepared)) == LAYERS
    assert int8_layers(model) == []


def test_operations_between_layers_compute_in_int8_as_well(fused):
    observed = observe(fused, ())

    nodes = {node.name for node in observed.graph.nodes if preparation.is_int8(node)}

    assert {"add", "features_0_2", "classifier_1"} < nodes
    assert not {"x", "mean"} & nodes


def test_a_rounded_tensor_is_what_every_int8_operation_reads(fused):
    model = round_activations(fused, scheme())

    for name, grid in quantizers(model).items():
        grid.scale.fill_(100 if name == "quantizers.features_0_2" else 0.01)
        grid.zero_point.fill_(100)
    rounded, summand, added = _outputs(
        model, _images(), ["quantizers_features_0_2", "quantizers_features_1_conv_1", "add"]
    )

    assert not rounded.any()  # No value reaches half of so large a step.
    assert torch.equal(added, summand)


def test_a_tensor_of_the_float_part_stays_as_it_is_for_those_who_read_it_in_float():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            x = torch.tanh(x.flatten(1)[:, :6])
            return torch.tanh(self.layer(x)) + x

    model = round_activations(_fused(Net(), "eval"), scheme())
    for grid in quantizers(model).values():
        grid.scale.fill_(100)
    x = _images()

    (got,) = _outputs(model, x, ["output"])

    # Rounded to a step of 100, all that the layer reads and gives is 0.
    assert torch.equal(got, torch.tanh(x.flatten(1)[:, :6]))


@pytest.mark.parametrize("bits", [7, 8])
def test_grids_that_are_still_to_be_found_have_the_scheme_s_number_of_steps(fused, bits):
    grids = quantizers(round_activations(fused, scheme(activation_bits=bits)))

    assert {type(grid) for grid in grids.values()} == {Grid}
    assert {(grid.quant_min, grid.quant_max) for grid in grids.values()} == {(0, 2**bits - 1)}


def test_a_calibrated_model_s_state_fits_one_whose_grids_are_still_to_be_found(fused):
    observed = observe(fused, ())
    observed(_images())
    choose_ranges(observed, scheme())
    blank = round_activations(_tiny("eval"), scheme())

    blank.load_state_dict(observed.state_dict())

    assert torch.equal(*_outputs(blank, _images(), ["output"]), *_outputs(observed, _images(), ["output"]))


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [7, 8])
def test_activations_keep_to_their_bits_in_training(trainable, bits, observer):
    prepared = prepare_qat(trainable, scheme(activation_bits=bits, observer=observer))

    assert {quantizer.bits for quantizer in quantizers(prepared).values()} == {bits}
    (rounded,) = _outputs(prepared, _images(), ["quantizers_x"])
    assert 2 ** (bits - 1) < len(rounded.unique()) <= 2**bits


@pytest.mark.parametrize(("weights", "dimensions"), [("per_tensor", 0), ("per_channel", 1)])
def test_weights_have_one_grid_per_tensor_or_per_channel_in_training(trainable, weights, dimensions):
    prepared = prepare_qat(trainable, scheme(weights=weights))

    layers = [prepared.get_submodule(path) for path in int8_layers(prepared)]
    assert {type(layer.weight_quantizer) for layer in layers} == {WeightFakeQuantize}
    assert {layer.weight_quantizer.largest.dim() for layer in layers} == {dimensions}
    prepared(_images())
    for layer in layers:
        scale = layer.weight_quantizer.grid().scale
        assert scale.shape == ((len(layer.weight),) if dimensions else ())
        assert (scale > 1e-6).all()


@pytest.mark.parametrize(("weights", "dimensions"), [("per_tensor", 0), ("per_channel", 1)])
def test_weights_have_one_grid_per_tensor_or_per_channel_once_converted(fused, weights, dimensions):
    model = convert(round_activations(fused, scheme(weights=weights)), scheme(weights=weights))

    assert {model.get_submodule(path).weight_quantizer.scale.dim() for path in LAYERS} == {dimensions}


def test_layers_without_batch_norm_round_their_weight_in_training():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))

    prepared = prepare_qat(_fused(net, "qat", (3, 8, 8)), scheme())

    assert type(prepared.get_submodule("0")) is QuantizedConv2d
    assert type(prepared.get_submodule("3")) is QuantizedLinear
    # The layers' own parameters are trained.
    prepared(_images(2, (3, 8, 8))).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    assert {id(parameter) for parameter in prepared.parameters()}.isdisjoint(id(each) for each in net.parameters())


# ReLU


@pytest.mark.parametrize("float_layers", [(), ("first",)])
def test_observing_changes_no_value_that_is_read_a_second_time(float_layers):
    """Where a ReLU writes over its input, nothing else may read it."""
    torch.manual_seed(0)
    model = _fused(Branch(), "eval")

    observed = observe(model, float_layers)

    x = _images()
    assert [name for name, module in observed.named_modules() if getattr(module, "inplace", False)] == ["alone", "clip"]
    names = [node.name for node in model.graph.nodes if node.name not in {"second", "last"}]
    for name, got, expected in zip(names, _outputs(observed, x, names), _outputs(model, x, names), strict=True):
        assert torch.equal(got, expected), name


@pytest.mark.parametrize(
    ("float_layers", "rounded"),
    [
        ((), ["x", "first", "alone", "behind_sum", "clip"]),
        # What the first layer gives is rounded once it is rectified; the sum reads it in float.
        (("first",), ["shared", "alone", "behind_sum", "clip"]),
    ],
)
def test_a_relu_behind_a_layer_is_left_to_the_quantization_that_follows(float_layers, rounded):
    model = prepare_qat(_fused(Branch(), "qat"), scheme(float_layers=float_layers))

    assert list(quantizers(model)) == [f"quantizers.{name}" for name in rounded]
    assert [name for name, quantizer in quantizers(model).items() if quantizer.fuses_relu] == ["quantizers.alone"]
    assert type(model.get_submodule("alone")) is nn.Identity
    assert type(model.get_submodule("shared")) is type(model.get_submodule("behind_sum")) is nn.ReLU
    assert type(model.get_submodule("clip")) is nn.ReLU6


@pytest.mark.parametrize("float_layers", [(), ("first",)])
def test_a_relu_that_is_left_to_quantization_trains_as_before(float_layers):
    torch.manual_seed(0)
    ours = prepare_qat(_fused(Branch(), "qat"), scheme(float_layers=float_layers))
    theirs = copy.deepcopy(ours)
    theirs.set_submodule("alone", nn.ReLU())
    quantizers(theirs)["quantizers.alone"].fuses_relu = False
    x = _images()

    for model in (ours, theirs):
        model(x).square().sum().backward()
        assert _outputs(model, x, ["quantizers_alone"])[0].min() == 0

    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


# In place or not


def test_preparing_leaves_the_given_model_as_it_was(prepare):
    put_in, model = prepare
    before, code = {name: value.clone() for name, value in model.state_dict().items()}, model.code

    prepared = put_in(model, scheme())
    prepared(_images())

    assert model.code == code
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(module, WeightFakeQuantize) for module in model.modules())


def test_preparing_in_place_changes_the_given_model_to_the_same(prepare):
    put_in, model = prepare
    expected = put_in(model, scheme())

    prepared = put_in(model, scheme(), inplace=True)

    assert prepared is model
    assert prepared.code == expected.code
    assert str(prepared.state_dict()) == str(expected.state_dict())


def test_only_a_model_for_training_is_in_training_mode(fused, trainable):
    assert not observe(fused.train(), ()).training
    assert not round_activations(fused.train(), scheme()).training
    prepared = prepare_qat(trainable.eval(), scheme())
    assert all(module.training for module in prepared.modules())


# Layers that stay float


@pytest.mark.filterwarnings("ignore:The TorchScript type system")  # Of the class that torch.fx itself writes.
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("features.1.conv.0.0", ["features.1.conv.0.0"]),
        ("Linear", ["classifier.1"]),
        ("features.2", ["features.2.conv.0.0", "features.2.conv.1.0", "features.2.conv.2"]),
        ("InvertedResidual", [path for path in LAYERS if path.startswith(("features.1", "features.2", "features.3"))]),
        ("Conv2d", LAYERS[:-1]),
    ],
)
def test_float_layers_stay_float_and_the_int8_model_runs(fused, name, kept, engine):
    own = scheme(float_layers=(name,))
    observed = observe(fused, own.float_layers)
    observed(_images())
    choose_ranges(observed, own)
    quantized = convert(observed, own)

    assert int8_layers(quantized) == [path for path in LAYERS if path not in kept]
    assert {type(quantized.get_submodule(path)) for path in kept} <= {nn.Conv2d, nn.Linear}
    x = _images(2)
    with use_engine(engine), torch.inference_mode():
        model = native.to_native(quantized)
        got = model(x)
        written = torch.jit.load(io.BytesIO(scripting.script(quantized, engine, SHAPE)))
        assert torch.equal(written(x), got)
    assert [type(model.get_submodule(path)) for path in kept] == [type(fused.get_submodule(path)) for path in kept]
    # Close to float: a grid that nothing has calibrated would give a constant.
    expected = fused(x)
    assert (got - expected).abs().max() < 0.3 * expected.abs().max()


def test_float_layers_in_training_are_trained_in_float(trainable):
    own = scheme(float_layers=("features.0.0", "classifier.1"))

    prepared = prepare_qat(trainable, own)

    prepared(_images()).sum().backward()
    assert int8_layers(prepared) == LAYERS[1:-1]
    first, last = prepared.get_submodule("features.0.0"), prepared.get_submodule("classifier.1")
    assert isinstance(first, ConvBatchNorm2d)
    assert type(first.weight_quantizer) is nn.Identity
    assert type(last) is nn.Linear
    assert first.weight.grad is not None
    assert last.weight.grad is not None


def test_preparing_knows_no_float_layers_but_the_model_s(prepare):
    put_in, model = prepare

    with pytest.raises(ModelError, match=r"did you mean 'classifier.1'"):
        put_in(model, scheme(float_layers=("clasifier.1",)))


def test_a_name_that_resembles_no_layer_is_an_error_with_some_that_exist(fused):
    with pytest.raises(ModelError, match=r"float_layers names 'Bogus'.* Its layers are features\.0\.0, "):
        find_layers(fused, ("features.1", "Bogus"))


@pytest.mark.parametrize("mode", ["eval", "qat"])
@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ((), []),
        (("classifier.1", "features.0.0"), ["classifier.1", "features.0.0"]),
        (("features.0.0", "features.0.0"), ["features.0.0"]),
        (("Linear",), ["classifier.1"]),
        (("Conv2d",), LAYERS[:-1]),
        # Classes that tracing went into.
        (("InvertedResidual",), ["features.1", "features.2", "features.3"]),
        # Of nested ones, the outermost.
        (("features.2.conv.0", "features.2", "features.2.conv.2"), ["features.2"]),
        (("Conv2d", "InvertedResidual"), ["features.0.0", "features.4.0", "features.1", "features.2", "features.3"]),
        (("features.1.conv.1", "features.1.conv.0.0"), ["features.1.conv.1", "features.1.conv.0.0"]),
    ],
)
def test_layers_are_found_by_path_and_by_class(wanted, found, mode):
    model = _built_once(mode)

    assert find_layers(model, wanted) == found
    assert find_layers(model, iter(wanted)) == found


def test_a_path_is_not_taken_for_the_beginning_of_another():
    net = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(11)))
    model = _fused(net, "eval")

    assert find_layers(model, ("1", "10")) == ["1", "10"]
    assert int8_layers(observe(model, ("1",))) == ["0", *(str(number) for number in range(2, 11))]


def test_a_layer_that_is_called_twice_is_named_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.last(self.layer(self.layer(x)))

    prepared = prepare_qat(_fused(Net(), "qat"), scheme())

    assert int8_layers(prepared) == ["layer", "last"]
    assert list(quantizers(prepared)) == [f"quantizers.{name}" for name in ("x", "layer", "layer_1", "last")]


# Layers of what cannot be traced


class Branching(nn.Module):
    """Cannot be traced: it branches on values."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.last(self.first(x)) if x.abs().mean() < 100 else x


class Around(nn.Module):
    """Layers that can be traced around one that cannot."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 3), Branching(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("observe", ActivationStatistics), ("round_activations", Grid), ("prepare_qat", ActivationFakeQuantize)],
)
def test_a_layer_of_what_cannot_be_traced_has_quantizers_of_its_own_before_and_after_it(name, kind):
    model = _fused(Around(), "qat" if name == "prepare_qat" else "eval")

    prepared = PREPARE[name](model, scheme())

    found = quantizers(prepared)
    assert set(found) == {
        "quantizers.x", "quantizers.stem", "quantizers.mean", "quantizers.head",
        "block.first.before", "block.first.after", "block.last.before", "block.last.after",
    }  # fmt: skip
    assert all(prepared.get_submodule(path) is each for path, each in found.items())
    assert {type(each) for each in found.values()} == {kind}
    assert len({id(each) for each in found.values()}) == len(found)
    assert set(int8_layers(prepared)) == {"stem", "block.first.layer", "block.last.layer", "head"}


def test_a_layer_of_what_cannot_be_traced_has_no_quantizers_if_it_stays_float():
    observed = observe(_fused(Around(), "eval"), ("block.first",))

    assert {path for path in quantizers(observed) if "block" in path} == {"block.last.before", "block.last.after"}
    assert type(observed.get_submodule("block.first")) is nn.Conv2d


def test_what_rounds_weights_is_no_quantizer_of_activations(fused):
    own = scheme()
    observed = observe(fused, ())
    observed(_images())
    choose_ranges(observed, own)

    quantized = convert(observed, own)

    assert {type(quantized.get_submodule(path).weight_quantizer) for path in LAYERS} == {Grid}
    assert list(quantizers(quantized)) == list(quantizers(observed))
