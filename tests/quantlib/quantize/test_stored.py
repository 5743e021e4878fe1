"""Stored models: whatever their state, one function opens them, and they come back exactly."""

import copy
import dataclasses
import io
from dataclasses import replace

import pytest
import torch
from schemes import scheme
from torch import fx, nn

from quantlib.errors import ModelError
from quantlib.graph import fusion
from quantlib.graph.tracing import is_whole, trace
from quantlib.models import checkpoint, mobilenet_v2, registry
from quantlib.models.checkpoint import Header
from quantlib.quantize import calibration, conversion, preparation, stored

STATES = ["float", "fused", "fused for QAT", "observed", "calibrated", "trainable", "quantized", "quantized after QAT"]
ARGUMENTS = {"num_classes": 3, "width_mult": 0.25, "inverted_residual_setting": [[1, 32, 1, 1], [2, 48, 1, 2]]}
HEADER = Header(architecture="mobilenet_v2", arguments=ARGUMENTS, code="", input_shape=(3, 32, 32))


@pytest.fixture(scope="module")
def make(stir_batch_norm, train_shard, val_inputs):
    """A model in some state, as the stages make it, and its header."""
    torch.manual_seed(0)
    net = trace(stir_batch_norm(mobilenet_v2.mobilenet_v2(**ARGUMENTS)), HEADER.input_shape)
    known = {"float": (net, HEADER)}
    known["fused"] = fusion.fuse_model(net, "eval"), replace(HEADER, fused="eval")
    known["fused for QAT"] = fusion.fuse_model(net, "qat"), replace(HEADER, fused="qat")
    observed = preparation.observe(known["fused"][0], ("features.0",))
    calibration.calibrate(observed, train_shard, batch_size=36)
    known["observed"] = observed, replace(HEADER, fused="eval", observed=("features.0",))

    def make_model(state, qconfig="fbgemm"):
        after_training = state in {"trainable", "quantized after QAT"}
        own_scheme = scheme(qconfig) if after_training else replace(scheme(qconfig), float_layers=("features.0",))
        model, header = copy.deepcopy(known.get(state, known["fused for QAT" if after_training else "observed"]))
        if state in known:
            return model, header
        if after_training:
            model = preparation.prepare_qat(model, own_scheme)
            with torch.no_grad():
                model(val_inputs)
        else:
            calibration.choose_ranges(model, own_scheme)
        header = replace(header, observed=None, scheme=own_scheme)
        if state.startswith("quantized"):
            model, header = conversion.convert(model, own_scheme), replace(header, quantized=True)
        return model, header

    return make_model


# One scale per weight tensor, and one per channel.
@pytest.mark.parametrize(
    ("state", "qconfig"), [*((state, "fbgemm") for state in STATES), *((state, "default") for state in STATES[4:])]
)
def test_a_stored_model_comes_back_bit_for_bit(make, val_inputs, state, qconfig):
    model, header = make(state, qconfig)

    content = checkpoint.save(model, header)
    opened, its_header = stored.open_model(content)

    assert isinstance(opened, fx.GraphModule)
    assert its_header == header
    assert header.state == state.split(" ", maxsplit=1)[0]
    assert opened.training == model.training
    assert checkpoint.save(model, header) == content
    assert checkpoint.save(opened, its_header) == content
    with torch.inference_mode():
        assert torch.equal(opened.eval()(val_inputs), model.eval()(val_inputs))


@pytest.mark.parametrize("state", STATES)
def test_a_stored_model_is_read_without_running_code(make, state):
    model, header = make(state)

    saved = torch.load(io.BytesIO(checkpoint.save(model, header)), weights_only=True)

    assert saved["header"] == dataclasses.asdict(header)


@pytest.mark.parametrize("state", STATES)
def test_a_model_handed_over_is_given_once_and_then_read_back(make, state):
    model, header = make(state)

    content = stored.hand_over(model, header)
    first, again = stored.open_model(content), stored.open_model(content)

    assert content == checkpoint.save(model, header)
    assert first == (model, header)
    assert again[0] is not model
    assert checkpoint.save(*again) == content


def test_no_model_is_taken_for_another(make):
    (float_model, float_header), (fused, fused_header) = make("float"), make("fused")
    first = stored.hand_over(float_model, float_header)
    stored.hand_over(fused, fused_header)

    opened, header = stored.open_model(first)

    assert opened is not float_model
    assert header == float_header


def test_the_kind_of_an_artifact_tells_the_models_state(make):
    kinds = [make(state)[1].kind for state in STATES]
    assert kinds[0] == "float-model"
    assert set(kinds) == {
        f"{state}-model" for state in ("float", "fused", "observed", "calibrated", "trainable", "quantized")
    }


@pytest.mark.parametrize("state", ["fused for QAT", "trainable"])
def test_a_model_read_back_is_trained_as_the_one_that_was_stored(make, val_inputs, state):
    # Whether a grid does the ReLU before it is in the plan, and not in the state_dict.
    model, header = make(state)
    opened, _ = stored.open_model(checkpoint.save(model, header))

    for each in (model, opened):
        torch.manual_seed(0)
        each.train()(val_inputs).square().sum().backward()

    gradients = dict(model.named_parameters())
    assert [name for name, own in opened.named_parameters() if not torch.equal(own.grad, gradients[name].grad)] == []
    assert checkpoint.save(opened, header) == checkpoint.save(model, header)


@pytest.mark.parametrize("state", STATES)
def test_a_blank_model_has_every_name_and_shape_of_the_stored_one(make, state):
    model, header = make(state)

    blank = stored.build_blank(header)

    assert {name: value.shape for name, value in blank.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert {name: type(module) for name, module in blank.named_modules() if name} == {
        name: type(module) for name, module in model.named_modules() if name
    }


class _Branching(nn.Module):
    """Cannot be traced: it branches on values."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu().mean([2, 3])) if x.mean() < 100 else x.mean([2, 3])


@pytest.mark.parametrize("state", ["float", "observed", "calibrated", "trainable", "quantized"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_cannot_be_traced_comes_back_bit_for_bit(monkeypatch, val_inputs, whole, state):
    def build():
        return _Branching() if whole else nn.Sequential(nn.Conv2d(3, 3, 1), _Branching())

    monkeypatch.setitem(registry.ARCHITECTURES, "branching", build)
    model = trace(build(), (3, 32, 32))
    header = replace(HEADER, architecture="branching", arguments={}, whole=is_whole(model))
    if state == "trainable":
        model = preparation.prepare_qat(fusion.fuse_model(model, "qat"), scheme("fbgemm"))
        header = replace(header, fused="qat", scheme=scheme("fbgemm"))
    elif state != "float":
        model, header = preparation.observe(fusion.fuse_model(model, "eval"), ()), replace(header, fused="eval")
        header = replace(header, observed=())
    with torch.no_grad():
        model(val_inputs)
    if state in {"calibrated", "quantized"}:
        calibration.choose_ranges(model, scheme("fbgemm"))
        header = replace(header, observed=None, scheme=scheme("fbgemm"))
    if state == "quantized":
        model, header = conversion.convert(model, header.scheme), replace(header, quantized=True)

    opened, its_header = stored.open_model(checkpoint.save(model, header))

    assert header.whole == whole
    assert header.state == state
    assert its_header == header
    with torch.inference_mode():
        assert torch.equal(opened.eval()(val_inputs), model.eval()(val_inputs))


def _with_another_layer(**arguments):
    model = mobilenet_v2.mobilenet_v2(**arguments)
    model.classifier.append(nn.Linear(3, 3))
    return model


def _with_layers_that_int8_cannot_compute(**arguments):
    model = mobilenet_v2.mobilenet_v2(**arguments)
    for number in range(2):
        model.features[2].conv[number][0].padding_mode = "reflect"
    return model


@pytest.mark.parametrize(
    ("change", "states"),
    [
        (_with_another_layer, STATES),
        # The same weights; only where values are rounded is different.
        (_with_layers_that_int8_cannot_compute, STATES[3:]),
    ],
)
def test_a_model_whose_library_has_changed_is_refused(make, monkeypatch, change, states):
    contents = {state: checkpoint.save(*make(state)) for state in states}
    monkeypatch.setitem(registry.ARCHITECTURES, "mobilenet_v2", change)

    for content in contents.values():
        with pytest.raises(ModelError, match="its plan differs in .* run the recipe again"):
            stored.open_model(content)
