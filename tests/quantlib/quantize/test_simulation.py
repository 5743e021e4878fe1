"""int8 accuracy by fake quantization in float."""

import copy
from collections.abc import Callable

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.eager.rounding import fake_quantize_qat
from quantlib.graph import fusion
from quantlib.quantize import conversion, preparation, simulation
from quantlib.quantize.simulation import Parts
from quantlib.runtimes.engine import use_engine

Calibrated = Callable[[str], nn.Module]


@pytest.fixture(scope="module")
def prepared(trained_model, calibrated, val_inputs):
    """A prepared model in either mode."""

    def get(mode, qconfig):
        if mode == "eval":
            return calibrated(qconfig)
        model = preparation.prepare(fusion.fuse_model(trained_model, "qat"), scheme(qconfig), "qat")
        with torch.no_grad():
            for _ in range(3):
                model(val_inputs)
        return model

    return get


def _noise(expected, got):
    """Root mean square of the difference, relative to the signal's."""
    return float((expected - got).norm() / expected.norm())


@pytest.mark.parametrize("mode", ["eval", "qat"])
@pytest.mark.parametrize("qconfig", ["default", "fbgemm", "onednn"])
def test_simulating_both_parts_gives_the_int8_models_logits(prepared, val_inputs, engine, mode, qconfig):
    model = prepared(mode, qconfig)
    simulated = simulation.simulate(model, mode, "both")
    int8 = conversion.convert(model, engine)
    with torch.inference_mode(), use_engine(engine):
        expected, got = int8(val_inputs), simulated(val_inputs)

    # The same values except for ties: of some thousand roundings, a few go the other way, by one step each.
    assert _noise(expected, got) < 0.02
    assert torch.equal(got.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("mode", ["eval", "qat"])
def test_each_part_alone_costs_less_than_both(prepared, trained_model, val_inputs, mode):
    model = prepared(mode, "default")
    noise: dict[Parts, float] = {}
    logits: dict[Parts, torch.Tensor] = {}
    unrounded = copy.deepcopy(model).eval()
    if mode == "qat":
        fake_quantize_qat(unrounded, weights=False, activations=False)
    with torch.inference_mode():
        expected = unrounded(val_inputs)
        for parts in ("both", "weights", "activations"):
            logits[parts] = simulation.simulate(model, mode, parts)(val_inputs)
            noise[parts] = _noise(expected, logits[parts])

    assert all(0 < value < 0.3 for value in noise.values()), noise
    assert noise["weights"] != noise["activations"]
    assert max(noise["weights"], noise["activations"]) < 1.2 * noise["both"]


@pytest.mark.parametrize("mode", ["eval", "qat"])
@pytest.mark.parametrize("parts", ["both", "weights", "activations"])
def test_activations_lie_on_a_grid_only_where_they_are_rounded(prepared, val_inputs, mode, parts):
    simulated = simulation.simulate(prepared(mode, "default"), mode, parts)
    seen: list[torch.Tensor] = []
    simulated.features[0][1].register_forward_hook(lambda *call: seen.append(call[-1]))

    with torch.inference_mode():
        simulated(val_inputs)

    num_values = len(seen[0].unique())
    assert num_values <= 128 if parts != "weights" else num_values > 1000


@pytest.mark.parametrize(("parts", "num_values"), [("both", 256), ("weights", 256), ("activations", None)])
def test_weights_of_a_calibrated_model_lie_on_a_grid_only_where_they_are_rounded(
    calibrated, fused_model, parts, num_values
):
    simulated = simulation.simulate(calibrated("default"), "eval", parts)
    rounded, own = simulated.features[-1][0][0].weight.detach(), fused_model.features[-1][0][0].weight.detach()

    if num_values is None:
        assert torch.equal(rounded, own)
    else:
        assert len(rounded.unique()) <= num_values
        step = (own.abs().max()) / 127.5  # symmetric: 255 steps from -max to max
        assert float((rounded - own).abs().max()) <= 0.51 * float(step)


@pytest.mark.parametrize("mode", ["eval", "qat"])
def test_simulating_leaves_the_prepared_model_as_it_was(prepared, val_inputs, mode):
    model = prepared(mode, "default")
    training = model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}

    with torch.inference_mode():
        simulation.simulate(model, mode, "weights")(5 * val_inputs)

    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_simulation_does_not_learn_from_what_it_sees(prepared, val_inputs):
    simulated = simulation.simulate(prepared("qat", "default"), "qat", "both")
    with torch.inference_mode():
        first = simulated(val_inputs)
        simulated(100 * val_inputs)
        assert torch.equal(simulated(val_inputs), first)
