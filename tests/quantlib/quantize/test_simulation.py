"""int8 accuracy in float: with all of the rounding, as torch's int8 kernels compute, or with some of it."""

import copy

import pytest
import torch
from branching import BranchingClassifier
from schemes import scheme
from torch import nn

from quantlib.export import native
from quantlib.graph import fusion
from quantlib.graph.tracing import trace
from quantlib.quantize import calibration, conversion, preparation, simulation
from quantlib.runtimes.engine import use_engine

MODES = ["eval", "qat"]


@pytest.fixture(scope="module")
def prepared(trained_model, calibrated, val_inputs):
    """A calibrated model, or one as training leaves it."""

    def get(mode, qconfig):
        if mode == "eval":
            return calibrated(qconfig)
        fused = fusion.fuse_model(trace(copy.deepcopy(trained_model), (3, 32, 32)), "qat")
        model = preparation.prepare_qat(fused, scheme(qconfig))
        with torch.no_grad():
            for _ in range(3):
                model(val_inputs)
        return model

    return get


@pytest.fixture(scope="module")
def quantized(prepared):
    """A quantized model, made once per way to it and qconfig; read-only."""
    known = {}

    def get(mode, qconfig):
        if (mode, qconfig) not in known:
            known[mode, qconfig] = conversion.convert(prepared(mode, qconfig), scheme(qconfig))
        return known[mode, qconfig]

    return get


def _noise(expected, got):
    """Root mean square of the difference, relative to the signal's."""
    return float((expected - got).norm() / expected.norm())


def _logits(model, x):
    with torch.inference_mode():
        return model(x)


def _in_float(quantized):
    """A quantized model without any rounding, made without `simulate`."""
    model = copy.deepcopy(quantized)
    for path in preparation.int8_layers(model):
        model.get_submodule(path).weight_quantizer = nn.Identity()
    for path in preparation.quantizers(model):
        model.set_submodule(path, nn.Identity())
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("qconfig", ["default", "fbgemm", "onednn"])
def test_simulating_both_parts_gives_the_logits_of_int8_kernels(quantized, val_inputs, engine, mode, qconfig):
    model = quantized(mode, qconfig)
    got = _logits(simulation.simulate(model, "both"), val_inputs)
    with use_engine(engine):
        expected = _logits(native.to_native(model), val_inputs)

    # The same values except for ties: of some thousand roundings, a few go the other way, by one step each.
    assert _noise(expected, got) < 0.02
    assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("mode", MODES)
def test_simulating_both_parts_is_what_the_quantized_model_does_itself(quantized, val_inputs, mode):
    model = quantized(mode, "fbgemm")

    simulated = simulation.simulate(model, "both")

    assert simulated is not model
    assert torch.equal(_logits(simulated, val_inputs), _logits(model, val_inputs))


@pytest.mark.parametrize("mode", MODES)
def test_each_part_alone_costs_less_than_both(quantized, val_inputs, mode):
    model = quantized(mode, "default")
    expected = _logits(_in_float(model), val_inputs)

    noise = {
        parts: _noise(expected, _logits(simulation.simulate(model, parts), val_inputs))
        for parts in ("both", "weights", "activations")
    }

    assert all(0 < value < 0.3 for value in noise.values()), noise
    assert noise["weights"] != noise["activations"]
    assert max(noise["weights"], noise["activations"]) < 1.2 * noise["both"]


def test_a_calibrated_model_has_its_weights_in_float(calibrated, fused_model, val_inputs):
    weights, activations = (simulation.simulate(calibrated("fbgemm"), parts) for parts in ("weights", "activations"))

    expected = _logits(fused_model, val_inputs)
    assert torch.equal(_logits(weights, val_inputs), expected)
    assert torch.equal(_logits(activations, val_inputs), _logits(calibrated("fbgemm"), val_inputs))
    assert not torch.equal(_logits(activations, val_inputs), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", ["both", "weights", "activations"])
def test_activations_lie_on_a_grid_only_where_they_are_rounded(quantized, val_inputs, mode, parts):
    simulated = simulation.simulate(quantized(mode, "default"), parts)
    seen = []
    simulated.get_submodule("quantizers.features_0_2").register_forward_hook(lambda *call: seen.append(call[-1]))

    _logits(simulated, val_inputs)

    num_values = len(seen[0].unique())
    assert num_values <= 128 if parts != "weights" else num_values > 1000


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", ["both", "weights", "activations"])
def test_weights_lie_on_a_grid_only_where_they_are_rounded(quantized, mode, parts):
    model = quantized(mode, "default")
    layer = simulation.simulate(model, parts).get_submodule("features.5.0")
    own = model.get_submodule("features.5.0").weight.detach()

    used = layer.weight_quantizer(layer.weight).detach()

    if parts == "activations":
        assert torch.equal(used, own)
    else:
        assert len(used.unique()) <= 256 < len(own.unique())
        # Symmetric: 255 steps from -max to max; of a trained weight, of the largest that training has seen.
        step = float(own.abs().max()) / 127.5 if mode == "eval" else float(layer.weight_quantizer.scale)
        assert float((used - own.clamp(-128 * step, 127 * step)).abs().max()) <= 0.501 * step


def test_each_part_is_rounded_alone_also_inside_what_cannot_be_traced(val_inputs):
    fused = fusion.fuse_model(trace(BranchingClassifier(), (3, 32, 32)), "eval")
    model = preparation.observe(fused, ())
    _logits(model, val_inputs)
    calibration.choose_ranges(model, scheme("default"))
    model = conversion.convert(model, scheme("default"))

    expected = _logits(fused, val_inputs)
    assert torch.equal(_logits(_in_float(model), val_inputs), expected)
    logits = [_logits(simulation.simulate(model, parts), val_inputs) for parts in ("both", "weights", "activations")]
    assert torch.equal(logits[0], _logits(model, val_inputs))
    for path in preparation.quantizers(model):
        model.set_submodule(path, nn.Identity())
    assert torch.equal(logits[1], _logits(model, val_inputs))
    assert all(0 < _noise(expected, each) < 0.1 for each in logits)
    assert not torch.equal(logits[1], logits[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", ["both", "weights", "activations"])
def test_simulating_leaves_the_model_as_it_was(quantized, val_inputs, mode, parts):
    model = quantized(mode, "default")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _logits(model, val_inputs)

    _logits(simulation.simulate(model, parts), 5 * val_inputs)

    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(_logits(model, val_inputs), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_simulation_does_not_learn_from_what_it_sees(quantized, val_inputs, mode):
    simulated = simulation.simulate(quantized(mode, "default"), "both")

    first = _logits(simulated, val_inputs)
    _logits(simulated, 100 * val_inputs)

    assert not simulated.training
    assert torch.equal(_logits(simulated, val_inputs), first)
