"""Layers measured one by one, against models that are quantized in just that way."""

import copy
import dataclasses

import pytest
import torch
from schemes import scheme

from quantlib import backend, evaluation, fusion, images, layers, preparation, qat, simulation


@pytest.fixture(scope="module")
def measured(fused_model, calibrated, train_shard):
    found = layers.measure_layers(fused_model, calibrated("default"), "eval", train_shard, 0, 36)
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


def test_min_max_ranges_cut_off_nothing_of_the_images_they_come_from(measured):
    # Rounding of earlier layers moves a value beyond the largest that calibration saw, now and then.
    assert sum(sums.num_clipped for sums in measured.values()) < 1e-3 * sum(s.num_values for s in measured.values())


@pytest.mark.parametrize("path", ["features.0.0", "features.1.conv.1"])
def test_a_layer_alone_is_the_model_with_that_layer_alone_quantized(path, measured, calibrated, train_shard):
    own = copy.deepcopy(calibrated("default"))
    for name, module in own.named_modules():
        inside = name == path or name.startswith(f"{path}.")
        if not inside and hasattr(module, "activation_post_process"):
            module.activation_post_process = torch.nn.Identity()
        if not inside and isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.qconfig = None
    alone = simulation.simulate(own, "eval", "both")
    x = images.to_input(images.open_shard(train_shard)[0])
    with torch.inference_mode():
        reference = copy.deepcopy(calibrated("default"))
        backend.fake_quantize_ptq(reference, weights=False, activations=False)
        target, answers = reference(x).log_softmax(1), alone(x).log_softmax(1)
    expected = float((target.exp() * (target - answers)).sum())
    assert measured[path].divergence_only == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert measured[path].num_correct_only == int(evaluation.evaluate(alone, train_shard, 12).top1_correct.sum())


def test_parts_of_the_images_add_up(measured, fused_model, calibrated, train_shard):
    model = calibrated("default")
    parts = [layers.measure_layers(fused_model, model, "eval", train_shard, *e) for e in ((0, 20), (20, 50))]
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
        prepared(images.to_input(images.open_shard(train_shard)[0]))
    found = layers.measure_layers(uneven, prepared, "eval", train_shard, 0, 36)
    assert max(found, key=lambda sums: sums.divergence_only).layer == "features.2.conv.0.0"


def test_a_model_in_training_is_measured_as_the_calibrated_one_that_it_starts_from(
    trained_model, fused_model, calibrated, train_shard
):
    prepared = calibrated("fbgemm")
    started = qat.start_from(fusion.fuse_model(trained_model, "qat"), prepared, scheme("fbgemm"))
    wanted = layers.measure_layers(fused_model, prepared, "eval", train_shard, 0, 36)
    found = layers.measure_layers(fused_model, started, "qat", train_shard, 0, 36)
    assert [sums.layer for sums in found] == [sums.layer for sums in wanted]
    for own, other in zip(found, wanted, strict=True):
        assert own.activation_max == pytest.approx(other.activation_max, rel=1e-4)
        assert own.num_correct_all_but == pytest.approx(other.num_correct_all_but, abs=1)


def test_layers_are_compared_with_float_and_not_with_a_model_of_corrected_biases(fused_model, calibrated, train_shard):
    prepared = copy.deepcopy(calibrated("default"))
    shifted = prepared.get_submodule("features.2.conv.0.0")[0]
    with torch.no_grad():
        shifted.bias += 5.0  # What a correction is, but more of it.
    found = {s.layer: s for s in layers.measure_layers(fused_model, prepared, "eval", train_shard, 0, 36)}
    plain = {s.layer: s for s in layers.measure_layers(fused_model, calibrated("default"), "eval", train_shard, 0, 36)}
    for path in ("quant", "features.0.0", "features.3.conv.0.0"):
        assert found[path].divergence_only == plain[path].divergence_only, path
    assert found["features.2.conv.0.0"].divergence_only > 10 * plain["features.2.conv.0.0"].divergence_only
    assert found["features.2.conv.0.0"].noise > 10 * plain["features.2.conv.0.0"].noise


def test_a_layer_kept_in_float_is_measured_with_the_grid_behind_it_and_offers_no_weight(fused_model, train_shard):
    kept = dataclasses.replace(scheme("default"), float_layers=("features.2.conv.0.0",))
    prepared = preparation.prepare(fused_model, kept, "eval")
    with torch.inference_mode():
        prepared(images.to_input(images.open_shard(train_shard)[0]))
    found = {s.layer: s for s in layers.measure_layers(fused_model, prepared, "eval", train_shard, 0, 36)}
    sums = found["features.2.conv.0.0"]
    assert (sums.weight_min, sums.weight_max) == (None, None)
    assert sums.activation_max > sums.activation_min
    assert sums.num_images == 36


def test_measuring_leaves_both_models_as_they_were(fused_model, calibrated, train_shard):
    before = [copy.deepcopy(model.state_dict()) for model in (fused_model, calibrated("default"))]
    kinds = [[type(m) for m in model.modules()] for model in (fused_model, calibrated("default"))]
    layers.measure_layers(fused_model, calibrated("default"), "eval", train_shard, 0, 12)
    for model, state, kind in zip((fused_model, calibrated("default")), before, kinds, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [type(m) for m in model.modules()] == kind
