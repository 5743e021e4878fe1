"""Layers measured one by one, against models quantized in exactly that way."""

import copy
import dataclasses

import pytest
import torch
from schemes import scheme

from quantlib.data import shards
from quantlib.eager.modules import DeQuantStub, QuantStub
from quantlib.graph import fusion
from quantlib.measure import evaluation, sensitivity
from quantlib.quantize import preparation, qat, simulation


@pytest.fixture(scope="module")
def measured(fused_model, calibrated, train_shard):
    found = sensitivity.measure_layers(fused_model, calibrated("default"), "eval", train_shard, 0, 36)
    return {sums.layer: sums for sums in found}


def test_every_layer_is_measured_once_with_its_class(measured, calibrated):
    assert measured["features.0.0"].type == "ConvReLU2d"
    assert measured["quant"].type == "QuantStub"
    assert "FloatFunctional" in {sums.type for sums in measured.values()}
    convs = [p for p, m in calibrated("default").named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len([sums for sums in measured.values() if sums.weight_min is not None]) == len(convs)


def test_ranges_are_those_of_the_weight_and_of_the_grid(measured, calibrated):
    first = calibrated("default").get_submodule("features.0.0")
    sums = measured["features.0.0"]
    assert (sums.weight_min, sums.weight_max) == pytest.approx(tuple(map(float, first[0].weight.detach().aminmax())))
    observer = first.activation_post_process
    assert sums.activation_max - sums.activation_min == pytest.approx(
        float(observer.max_val.clamp_min(0) - observer.min_val.clamp_max(0)), rel=0.01
    )


def test_min_max_ranges_clip_nothing_in_the_images_they_come_from(measured):
    # Rounding in earlier layers occasionally moves a value beyond the largest that calibration saw.
    assert sum(sums.num_clipped for sums in measured.values()) < 1e-3 * sum(s.num_values for s in measured.values())


def _quantized(prepared, is_wanted):
    """A model in which only the layers with wanted paths are quantized, made without `layers`."""
    own = copy.deepcopy(prepared)
    for name, module in own.named_modules():
        if not is_wanted(name) and hasattr(module, "activation_post_process"):
            module.activation_post_process = torch.nn.Identity()
        if not is_wanted(name) and isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.qconfig = None
    return simulation.simulate(own, "eval", "both")


def _measured_by_hand(prepared, path, shard):
    """divergence_only, num_correct_only and num_correct_all_but of one layer."""

    def is_inside(name):
        return name == path or name.startswith(f"{path}.")

    images = shards.open_shard(shard)
    x, y = images.inputs(), images.labels
    reference, alone = _quantized(prepared, lambda _: False), _quantized(prepared, is_inside)
    all_but = _quantized(prepared, lambda name: not is_inside(name))
    with torch.inference_mode():
        target, only, other = (model(x).log_softmax(1) for model in (reference, alone, all_but))
    divergence = float((target.exp() * (target - only)).sum())
    return divergence, int((only.argmax(1) == y).sum()), int((other.argmax(1) == y).sum())


def _found(sums):
    return sums.divergence_only, sums.num_correct_only, sums.num_correct_all_but


@pytest.mark.parametrize("path", ["quant", "features.0.0", "features.1.conv.1", "features.3.conv.0.0", "classifier.1"])
def test_a_layer_is_measured_like_models_in_which_only_it_or_all_but_it_is_quantized(
    path, measured, calibrated, train_shard
):
    expected = _measured_by_hand(calibrated("default"), path, train_shard)
    assert _found(measured[path]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_what_layers_are_compared_with_is_float_and_all_of_them_int8(measured, fused_model, calibrated, train_shard):
    models = fused_model, simulation.simulate(calibrated("default"), "eval", "both")
    right = [int(evaluation.evaluate(model, train_shard, 12).top1_correct.sum()) for model in models]
    assert {(sums.num_correct_float, sums.num_correct_int8) for sums in measured.values()} == {tuple(right)}


class _Twice(torch.nn.Module):
    """A layer that runs before and after another, and a ReLU that would overwrite its output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.first, self.twice, self.between = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.twice(self.relu(self.first(self.quant(x))))
        return 10.0 * self.dequant(self.twice(self.relu(self.between(x))))[:, 0, 4, 4:7]


@pytest.mark.parametrize("path", ["quant", "first", "twice", "between"])
def test_what_runs_again_after_a_layer_is_computed_again(path, train_shard):
    model = _Twice().eval()
    prepared = preparation.prepare(model, scheme("default"), "eval")
    with torch.inference_mode():
        prepared(8.0 * shards.open_shard(train_shard).inputs())  # A coarse grid, so that answers change.
    found = {s.layer: s for s in sensitivity.measure_layers(model, prepared, "eval", train_shard, 0, 36)}
    assert found[path].num_correct_all_but != found[path].num_correct_only
    assert _found(found[path]) == pytest.approx(_measured_by_hand(prepared, path, train_shard), rel=1e-3, abs=1e-5)
    assert found[path].signal > 10 * found[path].noise  # Each layer is compared with its own output, before ReLU.


def test_a_layer_that_is_never_called_costs_nothing(train_shard):
    model = _Twice().eval()
    model.unused = torch.nn.Conv2d(3, 3, 1)
    prepared = preparation.prepare(model, scheme("default"), "eval")
    with torch.inference_mode():
        prepared(shards.open_shard(train_shard).inputs())
        prepared.unused(torch.ones(1, 3, 4, 4))
    found = {s.layer: s for s in sensitivity.measure_layers(model, prepared, "eval", train_shard, 0, 36)}
    assert (found["unused"].num_values, found["unused"].divergence_only) == (0, 0.0)


def test_parts_of_the_images_add_up(measured, fused_model, calibrated, train_shard):
    model = calibrated("default")
    parts = [sensitivity.measure_layers(fused_model, model, "eval", train_shard, *e) for e in ((0, 20), (20, 50))]
    for first, second in zip(*parts, strict=True):
        whole = measured[first.layer]
        assert first.num_images + second.num_images == whole.num_images == 36
        assert first.noise + second.noise == pytest.approx(whole.noise, rel=1e-4)
        assert first.num_correct_all_but + second.num_correct_all_but == whole.num_correct_all_but


def test_a_layer_of_uneven_channels_costs_most(fused_model, train_shard):
    uneven = copy.deepcopy(fused_model)
    victim = uneven.get_submodule("features.2.conv.0.0")[0]
    with torch.no_grad():
        victim.weight[0] *= 1000.0  # One scale for all channels: the others become zero.
        victim.bias[0] *= 1000.0
    following = uneven.get_submodule("features.2.conv.1.0")[0]
    with torch.no_grad():
        following.weight[0] /= 1000.0
    prepared = preparation.prepare(uneven, scheme("default"), "eval")
    with torch.inference_mode():
        prepared(shards.open_shard(train_shard).inputs())
    found = sensitivity.measure_layers(uneven, prepared, "eval", train_shard, 0, 36)
    assert max(found, key=lambda sums: sums.divergence_only).layer == "features.2.conv.0.0"


def test_a_model_in_training_is_measured_as_the_calibrated_one_that_it_starts_from(
    trained_model, fused_model, calibrated, train_shard
):
    prepared = calibrated("fbgemm")
    started = qat.start_from(fusion.fuse_model(trained_model, "qat"), prepared, scheme("fbgemm"))
    wanted = sensitivity.measure_layers(fused_model, prepared, "eval", train_shard, 0, 36)
    found = sensitivity.measure_layers(fused_model, started, "qat", train_shard, 0, 36)
    assert [sums.layer for sums in found] == [sums.layer for sums in wanted]
    for own, other in zip(found, wanted, strict=True):
        assert own.activation_max == pytest.approx(other.activation_max, rel=1e-4)
        assert own.num_correct_all_but == pytest.approx(other.num_correct_all_but, abs=1)


def test_layers_are_compared_with_float_and_not_with_a_model_of_corrected_biases(fused_model, calibrated, train_shard):
    prepared = copy.deepcopy(calibrated("default"))
    shifted = prepared.get_submodule("features.2.conv.0.0")[0]
    with torch.no_grad():
        shifted.bias += 5.0  # Like a bias correction, but larger.
    found = {s.layer: s for s in sensitivity.measure_layers(fused_model, prepared, "eval", train_shard, 0, 36)}
    plain = {
        s.layer: s for s in sensitivity.measure_layers(fused_model, calibrated("default"), "eval", train_shard, 0, 36)
    }
    for path in ("quant", "features.0.0", "features.3.conv.0.0"):
        assert found[path].divergence_only == plain[path].divergence_only, path
    assert found["quant"].num_correct_int8 < found["quant"].num_correct_float == plain["quant"].num_correct_float
    # After it, "all but one layer" means those of the shifted model.
    assert found["features.3.conv.0.0"].num_correct_all_but < plain["features.3.conv.0.0"].num_correct_all_but
    assert found["features.2.conv.0.0"].divergence_only > 10 * plain["features.2.conv.0.0"].divergence_only
    assert found["features.2.conv.0.0"].noise > 10 * plain["features.2.conv.0.0"].noise


def test_a_layer_kept_in_float_is_measured_with_the_grid_behind_it_and_offers_no_weight(fused_model, train_shard):
    kept = dataclasses.replace(scheme("default"), float_layers=("features.2.conv.0.0",))
    prepared = preparation.prepare(fused_model, kept, "eval")
    with torch.inference_mode():
        prepared(shards.open_shard(train_shard).inputs())
    found = {s.layer: s for s in sensitivity.measure_layers(fused_model, prepared, "eval", train_shard, 0, 36)}
    sums = found["features.2.conv.0.0"]
    assert (sums.weight_min, sums.weight_max) == (None, None)
    assert sums.activation_max > sums.activation_min
    assert sums.num_images == 36


def test_measuring_leaves_both_models_as_they_were(fused_model, calibrated, train_shard):
    before = [copy.deepcopy(model.state_dict()) for model in (fused_model, calibrated("default"))]
    kinds = [[type(m) for m in model.modules()] for model in (fused_model, calibrated("default"))]
    sensitivity.measure_layers(fused_model, calibrated("default"), "eval", train_shard, 0, 12)
    for model, state, kind in zip((fused_model, calibrated("default")), before, kinds, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [type(m) for m in model.modules()] == kind
