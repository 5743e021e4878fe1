"""The Python API: quantize without a recipe, look at what came of it, save, load, and train further."""

import copy
import importlib.util
import inspect
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from quantlib import api
from quantlib.errors import MachineError, ModelError
from quantlib.graph.fusion import freeze_batch_norm
from quantlib.models import exported_file
from quantlib.quantize.fake_quantization import freeze_observers

LAYERS = ["stem.0", "block.0", "head"]


class Net(nn.Module):
    """Two convolutions with BatchNorm, a sum, and a linear layer, for images of 16 x 16 pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class Branching(nn.Module):
    """Bright images go through a layer more than dark ones: this cannot be traced."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        y = self.first(x).relu()
        bright = x.mean((1, 2, 3)) > 0
        if bright.any():
            y = y.index_put((bright,), self.second(y[bright]))
        return self.last(y.mean((2, 3)))


class Around(nn.Module):
    """A layer that can be traced in front of a module that cannot."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 3, 1, bias=False), Branching()
        self.stem.weight.data.mul_(0.1).add_(torch.eye(3).view(3, 3, 1, 1))  # Dark stays dark.

    def forward(self, x):
        return self.inner(self.stem(x))


def decibels(got, expected):
    """The ratio of signal to noise."""
    noise = float((got - expected).square().sum())
    return 10 * math.log10(float(expected.square().sum()) / noise) if noise else math.inf


def in_float(model, x):
    with torch.inference_mode():
        return model(x)


def needs(runtime):
    for package in ("onnx", runtime):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_same(state, model):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[name], value) for name, value in state.items())


@pytest.fixture(scope="module")
def net(stir_batch_norm):
    """A net whose channels differ enough for rounding to show; read-only."""
    torch.manual_seed(0)
    net = stir_batch_norm(Net())
    for layer in (net.stem[0], net.block[0], net.head):
        layer.weight.data[0] *= 10
    return net.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def batches(images):
    return images.split(16)


@pytest.fixture(scope="module")
def quantized(net, batches):
    return api.quantize(net, batches)


# quantize


def test_quantizing_leaves_the_model_and_the_images_as_they_were(net, batches):
    own, shown = copy.deepcopy(net).train(), [batch.clone() for batch in batches]
    own.head.eval()
    state, modes, modules = state_of(own), [each.training for each in own.modules()], list(own.modules())

    api.quantize(own, shown)

    assert is_same(state, own)
    assert [each.training for each in own.modules()] == modes
    assert all(one is other for one, other in zip(own.modules(), modules, strict=True))
    assert not any(each._forward_hooks for each in own.modules())
    assert all(torch.equal(one, other) for one, other in zip(shown, batches, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(iter, id="an iterator"),
        pytest.param(lambda batches: [[x, torch.zeros(len(x))] for x in batches], id="lists"),
        pytest.param(lambda batches: [(x, None, "more") for x in batches], id="tuples"),
        pytest.param(
            lambda batches: DataLoader(TensorDataset(torch.cat(batches), torch.zeros(64)), batch_size=16),
            id="a DataLoader with labels",
        ),
        pytest.param(lambda batches: DataLoader(torch.cat(batches), batch_size=16), id="a DataLoader without labels"),
    ],
)
def test_batches_may_come_in_any_form(net, batches, quantized, images, given):
    got = api.quantize(net, given(batches))

    assert torch.equal(got(images), quantized(images))


def test_answers_are_near_floats(net, quantized, images):
    logits = quantized(images)

    assert logits.shape == (64, 5)
    assert not logits.requires_grad
    assert 30 < decibels(logits, in_float(net, images)) < 60
    # The last layer gives int8.
    assert len(logits.unique()) <= 256
    assert torch.equal(quantized(images[:1]), logits[:1])


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([], id="none"),
        pytest.param(torch.zeros(4, 3, 16, 16), id="images instead of batches"),
        pytest.param([torch.zeros(0, 3, 16, 16)], id="a batch without images"),
        pytest.param([torch.zeros(4, 3, 16, 16), torch.zeros(4)], id="one that is no batch"),
        pytest.param([(["a.jpg"], torch.zeros(1))], id="names of files"),
    ],
)
def test_without_batches_of_images_there_is_an_error(net, given):
    with pytest.raises(ModelError, match=r"needs batches of calibration images, float32 \[N, C, H, W\]|got 0 batches"):
        api.quantize(net, given)


def test_a_model_with_nothing_to_quantize_is_an_error(batches):
    with pytest.raises(ModelError, match="nothing to quantize"):
        api.quantize(nn.Flatten(), batches)


# Options of quantize


@pytest.mark.parametrize(
    "options",
    [
        {"observer": "minmax"},
        {"observer": "moving_average"},
        {"observer": "histogram"},
        {"observer": "percentile"},
        {"weights": "per_tensor"},
        {"smoothing": None},
        {"smoothing": None, "equalize": True},
        {"bias_correction": False},
    ],
    ids=str,
)
def test_each_option_makes_another_model_that_is_near_float(net, batches, quantized, images, options):
    got = api.quantize(net, batches, **options)(images)

    assert not torch.equal(got, quantized(images))
    assert decibels(got, in_float(net, images)) > 20


def test_smoothing_rescues_a_model_whose_norm_has_channels_much_larger_than_others(batches, images):
    torch.manual_seed(0)
    norm, reader = nn.LayerNorm(16), nn.Linear(16, 5)
    factors = torch.logspace(-2, 2, 16)
    norm.weight.data *= factors
    reader.weight.data /= factors
    model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(3, 16, 4), nn.Flatten(), norm, reader).eval()
    plain, smoothed = (
        decibels(api.quantize(model, batches, smoothing=alpha)(images), in_float(model, images))
        for alpha in (None, 0.5)
    )
    assert smoothed > plain + 10


def test_activations_have_as_many_bits_as_asked_for(batches, images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())  # Gives enough values to meet every step.
    errors, counts = {}, {}
    for bits in (7, 8):
        own = api.quantize(net, batches, activation_bits=bits)
        errors[bits], counts[bits] = own.compare(images)[0].sqnr_db, len(own(images).unique())

    assert 64 < counts[7] <= 128 < counts[8] <= 256
    # A bit is 6 dB, on the input, which comes through no other layer.
    assert errors[8] - errors[7] == pytest.approx(6, abs=1.5)


def test_bias_correction_brings_the_mean_logits_nearer_to_floats(net, batches, images):
    settings = {"weights": "per_tensor", "equalize": False, "activation_bits": 7}
    wanted = in_float(net, images).mean(0)

    before, after = (
        float((api.quantize(net, batches, bias_correction=own, **settings)(images).mean(0) - wanted).abs().max())
        for own in (False, True)
    )

    assert after < 0.5 * before


# float_layers


@pytest.mark.parametrize(
    ("float_layers", "kept"),
    [(("head",), ["head"]), (["block"], ["block.0"]), (("Conv2d",), ["stem.0", "block.0"])],
)
def test_float_layers_stay_float(net, batches, quantized, images, float_layers, kept):
    own = api.quantize(net, batches, float_layers=float_layers)

    assert [layer.path for layer in own.layers] == LAYERS
    assert {layer.path: layer.reason for layer in own.layers if not layer.int8} == dict.fromkeys(
        kept, "the recipe keeps it float"
    )
    assert [each.layer for each in own.compare(images) if each.type in {"Conv2d", "Linear"}] == [
        path for path in LAYERS if path not in kept
    ]
    # Only a layer in float gives more values than int8 has.
    assert (len(own(images).unique()) > 256) == ("head" in kept)
    assert decibels(own(images), in_float(net, images)) > 30


def test_with_every_layer_in_float_the_answers_are_floats(net, batches, images):
    own = api.quantize(net, batches, float_layers=("Conv2d", "Linear"))

    assert [layer.int8 for layer in own.layers] == [False] * 3
    assert own.compare(images) == []
    torch.testing.assert_close(own(images), in_float(net, images), rtol=1e-4, atol=1e-4)


def test_a_float_layer_that_the_model_lacks_is_an_error(net, batches):
    with pytest.raises(ModelError, match=r"float_layers names 'haed'.* \(did you mean 'head'\?\)"):
        api.quantize(net, batches, float_layers=("haed",))


# What came of it


def test_layers_say_what_becomes_int8(quantized):
    assert quantized.layers == (
        api.LayerPlan("stem.0", "Conv2d", int8=True, reason="", num_multiplications=8 * 8 * 8 * 27),
        api.LayerPlan("block.0", "Conv2d", int8=True, reason="", num_multiplications=8 * 8 * 8 * 72),
        api.LayerPlan("head", "Linear", int8=True, reason="", num_multiplications=40),
    )


def test_layers_say_why_one_stays_float(batches):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(4 * 256, 5))

    layers = api.quantize(net, batches).layers

    assert [(layer.path, layer.int8, layer.reason) for layer in layers] == [
        ("0", False, "its padding is reflect"),
        ("2", True, ""),
    ]


def test_compare_names_every_rounded_tensor_in_the_order_of_the_layers(quantized, images):
    errors = quantized.compare(images)

    assert {type(each) for each in errors} == {api.LayerError}
    assert [(each.layer, each.type) for each in errors] == [
        ("x", "input"),
        ("stem.0", "Conv2d"),
        ("block.0", "Conv2d"),
        ("mean", "mean"),
        ("head", "Linear"),
    ]
    assert all(20 < each.sqnr_db < 70 for each in errors)


def test_compare_measures_the_error_of_the_logits_at_the_last_layer(net, quantized, images):
    for x in (images, images[:7]):
        expected = decibels(quantized(x), in_float(net, x))
        assert quantized.compare(x)[-1].sqnr_db == pytest.approx(expected, abs=0.01)


def test_compare_changes_no_answer(quantized, images):
    before = quantized(images)

    assert quantized.compare(images) == quantized.compare(images)
    assert torch.equal(quantized(images), before)


def test_compare_knows_no_noise_where_rounding_changes_nothing(net):
    # From 0 to 255, minmax rounds to whole numbers.
    x = torch.randint(0, 256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    own = api.quantize(net, [x], observer="minmax", activation_bits=8)

    errors = {each.layer: each.sqnr_db for each in own.compare(x)}

    assert errors["x"] == math.inf
    assert math.isfinite(errors["head"])


def test_compare_leaves_out_a_tensor_that_is_all_zero(quantized):
    errors = quantized.compare(torch.zeros(2, 3, 16, 16))

    assert [each.layer for each in errors] == ["stem.0", "block.0", "mean", "head"]


# save and load


def is_int8(path):
    """Whether the file of `Net` holds the weights of its three layers as int8."""
    if path.suffix == ".pt":
        graph = str(torch.jit.load(str(path)).inlined_graph)
        return len(re.findall(r"quantized::(?:conv2d|linear)\w*\(", graph)) == len(LAYERS)
    if path.suffix == ".pt2":
        state = exported_file.read_state(str(path))
        return all(state[f"{layer}.weight"].dtype == torch.int8 for layer in LAYERS)
    import onnx

    initializers = {each.name: each for each in onnx.load(path).graph.initializer}
    int8 = {name for name, each in initializers.items() if each.data_type == onnx.TensorProto.INT8 and each.dims}
    return {f"{path}.weight_int8" for path in LAYERS} <= int8


@pytest.mark.parametrize("suffix", [".pt", ".onnx", ".pt2"])
def test_a_file_saved_for_no_runtime_in_particular_answers_as_the_model(quantized, images, tmp_path, suffix):
    if suffix == ".onnx":
        needs("onnxruntime")

    quantized.save(tmp_path / f"model{suffix}")

    loaded = api.load(tmp_path / f"model{suffix}", "onnxruntime" if suffix == ".onnx" else None)
    assert decibels(loaded(images), quantized(images)) > 30
    assert is_int8(tmp_path / f"model{suffix}")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_saved_for_an_onnx_runtime_answers_as_the_model(quantized, net, images, tmp_path, runtime):
    needs(runtime)
    path = tmp_path / "model.onnx"

    quantized.save(str(path), runtime)

    loaded = api.load(str(path), runtime, num_threads=1)
    assert decibels(loaded(images), quantized(images)) > 30
    assert decibels(loaded(images), in_float(net, images)) > 30
    # For any number of images.
    assert decibels(loaded(images[:3]), quantized(images[:3])) > 30
    assert is_int8(path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def test_what_an_onnx_file_rounds_depends_on_its_runtime(quantized, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    rounded = {}
    for runtime in (None, "onnxruntime", "openvino"):
        quantized.save(tmp_path / "model.onnx", runtime)
        nodes = onnx.load(tmp_path / "model.onnx").graph.node
        rounded[runtime] = sum(node.op_type == "QuantizeLinear" for node in nodes)

    # ONNX Runtime wants every tensor rounded; OpenVINO those that a layer reads in int8, and no layer reads the logits.
    assert rounded[None] == rounded["onnxruntime"] == 5
    assert rounded["openvino"] < 5


def test_a_file_saved_for_an_engine_answers_as_the_model(quantized, images, engine, tmp_path):
    path = tmp_path / "model.pt"

    quantized.save(path, f"torchscript-{engine}")

    loaded = api.load(path, f"torchscript-{engine}")
    assert decibels(loaded(images), quantized(images)) > 30
    assert decibels(loaded(images[:3]), quantized(images[:3])) > 30


def test_saving_again_gives_the_same_bytes_and_changes_no_answer(quantized, images, tmp_path):
    before = quantized(images)
    contents = []
    for _ in range(2):
        quantized.save(tmp_path / "model.pt")
        contents.append((tmp_path / "model.pt").read_bytes())

    assert contents[0] == contents[1]
    assert torch.equal(quantized(images), before)


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("model.tflite", None),
        ("model", None),
        ("model.pt", "onnxruntime"),
        ("model.pt", "openvino"),
        ("model.onnx", "torchscript"),
        ("model.onnx", "tensorrt"),
        ("model.pt2", "onnxruntime"),
    ],
)
def test_a_file_that_is_not_for_the_runtime_is_one_clear_error(quantized, tmp_path, name, runtime):
    message = (
        f"'{name}' is not a file for {runtime or 'any runtime'}: NAME.pt is for torchscript-ENGINE, "
        "NAME.onnx for onnxruntime and openvino, NAME.pt2 for torch_export, NAME.pte for executorch."
    )

    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        quantized.save(tmp_path / name, runtime)

    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_this_machine_lacks_is_an_error(quantized, tmp_path):
    with pytest.raises(MachineError, match="Engine 'abacus' is not available"):
        quantized.save(tmp_path / "model.pt", "torchscript-abacus")

    assert list(tmp_path.iterdir()) == []


# trainable and trained


@pytest.fixture(scope="module")
def labels(images):
    """The channel that is brightest: easy to learn."""
    return images.mean((2, 3)).argmax(1)


@pytest.fixture(scope="module")
def after_training(quantized, images, labels):
    """What `trainable` gave, after some steps of an optimizer; read-only."""
    torch.manual_seed(0)
    model = quantized.trainable()
    freeze_batch_norm(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "options", [{}, {"weights": "per_tensor", "activation_bits": 7, "float_layers": ("block",)}], ids=str
)
def test_training_starts_at_the_answers_of_the_quantized_model(net, batches, images, options):
    own = api.quantize(net, batches, **options)

    model = own.trainable()

    assert all(module.training for module in model.modules())
    got, expected = own.trained(model)(images), own(images)
    # Biases come out of BatchNorm's: a value between two steps may round to the other.
    assert (got != expected).float().mean() < 0.01
    torch.testing.assert_close(got, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))


def test_an_optimizer_trains_it(quantized, after_training, images, labels):
    trained = quantized.trained(after_training)

    assert isinstance(trained, api.QuantizedModel)
    logits = trained(images)
    assert logits.shape == (64, 5)
    before, after = (float(nn.functional.cross_entropy(each, labels)) for each in (quantized(images), logits))
    assert after < 0.7 * before


def test_every_weight_and_bias_learns(quantized, images, labels):
    model = quantized.trainable()

    nn.functional.cross_entropy(model(images), labels).backward()

    names = [name for name, _ in model.named_parameters()]
    assert {f"{path}.weight" for path in LAYERS} <= set(names)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_what_is_trained_answers_as_it_did_in_training(quantized, after_training, images):
    model = copy.deepcopy(after_training).eval()
    freeze_observers(model)

    got, expected = quantized.trained(after_training)(images), in_float(model, images)

    assert decibels(got, expected) > 40


def test_training_changes_neither_the_quantized_model_nor_another_in_training(net, batches, images, labels):
    own = api.quantize(net, batches)
    answers, other, state = own(images), own.trainable(), state_of(net)
    model = own.trainable()

    nn.functional.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)

    assert torch.equal(own(images), answers)
    assert (own.trained(other)(images) != answers).float().mean() < 0.01
    assert decibels(own.trained(model)(images), answers) < 20
    assert is_same(state, net)


def test_training_can_go_on_after_a_look_at_the_quantized_model(quantized, after_training, images):
    state = state_of(after_training)

    trained = quantized.trained(after_training)
    trained(images)

    assert is_same(state, after_training)
    assert after_training.training
    # Whatever happens to the one in training, the quantized model is one of its own.
    answers, further = trained(images), copy.deepcopy(after_training)
    own = quantized.trained(further)
    with torch.no_grad():
        for parameter in further.parameters():
            parameter.zero_()
    assert torch.equal(own(images), answers)


@pytest.mark.parametrize(("name", "runtime"), [("model.pt", None), ("model.pt2", None), ("model.onnx", "onnxruntime")])
def test_a_trained_model_is_saved_as_any_other(quantized, after_training, images, tmp_path, name, runtime):
    if runtime:
        needs(runtime)
    trained = quantized.trained(after_training)

    trained.save(tmp_path / name, runtime)

    loaded = api.load(tmp_path / name, runtime)
    assert decibels(loaded(images), trained(images)) > 30
    assert decibels(loaded(images), quantized(images)) < 20
    assert is_int8(tmp_path / name)


def test_a_trained_model_is_compared_with_the_float_model(net, quantized, after_training, images):
    trained = quantized.trained(after_training)

    assert trained.layers == quantized.layers
    last = trained.compare(images)[-1]
    assert (last.layer, last.type) == ("head", "Linear")
    assert last.sqnr_db == pytest.approx(decibels(trained(images), in_float(net, images)), abs=0.01)


def test_something_else_than_what_was_to_be_trained_is_an_error(quantized, net):
    with pytest.raises(
        ModelError, match=re.escape("trained() takes what trainable() returned, and got another model.")
    ):
        quantized.trained(net)
    with pytest.raises(ModelError, match="got another model"):
        quantized.trained(torch.fx.symbolic_trace(net))


def test_training_goes_on_where_it_ended(quantized, after_training, images):
    trained = quantized.trained(after_training)
    assert torch.equal(trained.trained(trained.trainable().eval())(images), trained(images))
    assert not torch.equal(trained(images), quantized(images))


# Models that branch on values


@pytest.fixture(scope="module", params=["the model itself", "a module of it"])
def branching(request, images):
    """A model that branches, dark and bright images, and what came of it."""
    torch.manual_seed(0)
    own = (Branching() if request.param == "the model itself" else Around()).eval()
    dark, bright = images - 4, images + 4
    quantized = api.quantize(own, [*dark.split(16), *bright.split(16)])
    return own, (dark, bright), quantized


def test_a_model_that_branches_on_values_is_quantized_layer_by_layer(branching):
    own, both, quantized = branching

    whole = "inner" if isinstance(own, Around) else "model"
    assert {layer.path: layer.int8 for layer in quantized.layers if layer.path != "stem"} == {
        f"{whole}.{name}": True for name in ("first", "second", "last")
    }
    for x in both:
        assert 25 < decibels(quantized(x), in_float(own, x)) < 70
        assert len(quantized(x).unique()) <= 256
    together = quantized(torch.cat([x[:3] for x in both]))
    torch.testing.assert_close(together, torch.cat([quantized(x[:3]) for x in both]))
    # The two ways differ.
    skipping = copy.deepcopy(own)
    skipping.get_submodule("inner.second" if whole == "inner" else "second").weight.data.zero_()
    assert decibels(in_float(skipping, both[1]), in_float(own, both[1])) < 20
    assert torch.equal(in_float(skipping, both[0]), in_float(own, both[0]))


def test_a_model_that_branches_on_values_branches_in_its_torchscript_file(branching, tmp_path):
    _, both, quantized = branching

    quantized.save(tmp_path / "model.pt")

    loaded = api.load(tmp_path / "model.pt")
    for x in both:
        assert decibels(loaded(x), quantized(x)) > 30


def test_a_model_that_branches_on_values_is_no_onnx_file(branching, tmp_path):
    _, _, quantized = branching

    with pytest.raises(ModelError, match="cannot be written as ONNX: (model|inner) branches on values"):
        quantized.save(tmp_path / "model.onnx")

    assert list(tmp_path.iterdir()) == []


def test_a_model_that_branches_on_values_trains_from_where_it_is(branching):
    _, both, quantized = branching
    model = quantized.trainable()

    own = quantized.trained(model)

    for x in both:
        assert (own(x) != quantized(x)).float().mean() < 0.01
    model(both[1]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# The module


def test_the_module_offers_what_it_documents():
    defined = {
        name
        for name, value in vars(api).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == api.__name__
        and not name.startswith("_")
    }

    # LayerPlan is what `layers` holds.
    assert sorted(api.__all__) == sorted({*defined, "LayerPlan"})
    assert all(inspect.getdoc(getattr(api, name)) for name in api.__all__)
    assert set(re.findall(r"\bapi\.(\w+)", api.__doc__)) <= set(api.__all__)
    methods = set(re.findall(r"\bquantized\.(\w+)", api.__doc__))
    assert methods
    assert all(inspect.getdoc(getattr(api.QuantizedModel, name)) for name in methods)
