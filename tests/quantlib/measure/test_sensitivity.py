"""Layers measured one by one, against models quantized in exactly that way."""

import copy
import dataclasses

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.data import shards
from quantlib.graph import fusion
from quantlib.graph.tracing import trace
from quantlib.measure import evaluation, sensitivity
from quantlib.quantize import calibration, conversion, preparation, qat

SHAPE = (3, 32, 32)


def _measure(reference, quantized, shard, start=0, stop=36):
    return {sums.layer: sums for sums in sensitivity.measure_layers(reference, quantized, shard, start, stop)}


def _quantize(fused, own_scheme, x):
    """A quantized model whose ranges are those of `x`."""
    model = preparation.observe(fused, own_scheme.float_layers)
    with torch.inference_mode():
        model(x)
    calibration.choose_ranges(model, own_scheme)
    return conversion.convert(model, own_scheme)


@pytest.fixture(scope="module")
def quantized(calibrated):
    """The quantized net, read-only."""
    return conversion.convert(calibrated("default"), scheme("default"))


@pytest.fixture(scope="module")
def measured(fused_model, quantized, train_shard):
    return _measure(fused_model, quantized, train_shard)


def test_every_layer_and_every_other_rounded_tensor_is_measured_once(fused_model, quantized, train_shard):
    found = sensitivity.measure_layers(fused_model, quantized, train_shard, 0, 1)

    weights = [sums.layer for sums in found if sums.weight_min is not None]
    assert weights == preparation.int8_layers(quantized)
    assert {sums.layer for sums in found} - set(weights) == {"x", "add", "add_1", "classifier_0"}
    assert len(found) == len(preparation.quantizers(quantized)) == 18


def test_each_has_the_type_of_what_gives_it(measured):
    assert measured["features.0.0"].type == "Conv2d"
    assert measured["classifier.1"].type == "Linear"
    assert measured["add"].type == "add"
    assert "quantizer" not in measured["x"].type


def test_ranges_are_those_of_the_weight_and_of_the_grid(measured, calibrated, fused_model):
    sums = measured["features.0.0"]
    weight, grids = fused_model.get_submodule("features.0.0").weight, preparation.quantizers(calibrated("default"))
    assert (sums.weight_min, sums.weight_max) == tuple(map(float, weight.detach().aminmax()))
    assert (sums.activation_min, sums.activation_max) == grids["quantizers.features_0_2"].range[:2]
    assert sums.activation_min == 0 < sums.activation_max


def test_min_max_ranges_clip_nothing_in_the_images_they_come_from(measured):
    # Rounding in earlier layers occasionally moves a value beyond the largest that calibration saw.
    assert sum(sums.num_clipped for sums in measured.values()) < 1e-3 * sum(s.num_values for s in measured.values())


def test_values_outside_the_grid_are_counted(fused_model, quantized, train_shard):
    narrow = copy.deepcopy(quantized)
    grid = narrow.get_submodule("quantizers.features_0_2")
    grid.scale /= 4
    outputs = []
    narrow.get_submodule("features.0.2").register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.inference_mode():
        narrow(shards.open_shard(train_shard).inputs())

    sums = _measure(fused_model, narrow, train_shard)["features.0.0"]

    assert sums.num_values == outputs[0].numel()
    expected = int((outputs[0] > grid.range[1] + grid.range[2] / 2).sum())
    assert sums.num_clipped == pytest.approx(expected, abs=2)
    assert sums.num_clipped > 1000


def _only(quantized, layers, tensors):
    """A quantized model in which only some layers and tensors are rounded."""
    own = copy.deepcopy(quantized)
    for path in preparation.int8_layers(own):
        if path not in layers:
            own.get_submodule(path).weight_quantizer = nn.Identity()
    for path in preparation.quantizers(own):
        if path not in tensors:
            own.set_submodule(path, nn.Identity())
    return own


def _measured_by_hand(quantized, layer, tensors, shard):
    """divergence_only, num_correct_only and num_correct_all_but of a layer and the tensors that are its output."""
    images = shards.open_shard(shard)
    x, y = images.inputs(), images.labels
    layers, grids = set(preparation.int8_layers(quantized)), set(preparation.quantizers(quantized))
    tensors = {f"quantizers.{name}" for name in tensors}
    models = (
        _only(quantized, (), ()),
        _only(quantized, {layer}, tensors),
        _only(quantized, layers - {layer}, grids - tensors),
    )
    with torch.inference_mode():
        target, only, other = (model(x).log_softmax(1) for model in models)
    divergence = float((target.exp() * (target - only)).sum())
    return divergence, int((only.argmax(1) == y).sum()), int((other.argmax(1) == y).sum())


def _found(sums):
    return sums.divergence_only, sums.num_correct_only, sums.num_correct_all_but


@pytest.mark.parametrize(
    ("path", "tensor"),
    [
        ("x", "x"),
        ("features.0.0", "features_0_2"),
        ("features.1.conv.1", "features_1_conv_1"),
        ("add", "add"),
        ("features.3.conv.0.0", "features_3_conv_0_2"),
        ("classifier.1", "classifier_1"),
    ],
)
def test_a_layer_is_measured_like_models_in_which_only_it_or_all_but_it_is_quantized(
    path, tensor, measured, quantized, train_shard
):
    expected = _measured_by_hand(quantized, path, {tensor}, train_shard)
    assert expected[0] > 0
    assert _found(measured[path]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_what_layers_are_compared_with_is_float_and_all_of_them_int8(measured, fused_model, quantized, train_shard):
    models = fused_model, quantized
    right = [int(evaluation.evaluate(model, train_shard, 12).top1_correct.sum()) for model in models]
    assert {(sums.num_correct_float, sums.num_correct_int8) for sums in measured.values()} == {tuple(right)}


class _Twice(nn.Module):
    """A layer that runs before and after another, and a ReLU that would overwrite its output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.between = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.unused = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.twice(self.relu(self.first(x)))
        return 10.0 * self.twice(self.relu(self.between(x)))[:, 0, 4, 4:7]


@pytest.fixture
def run_twice(train_shard):
    """A float model with such a layer, and the quantized one."""
    fused = fusion.fuse_model(trace(_Twice(), SHAPE), "eval")
    # A coarse grid, so that answers change.
    return fused, _quantize(fused, scheme("default"), 8.0 * shards.open_shard(train_shard).inputs())


@pytest.mark.parametrize(("path", "tensor"), [("x", "x"), ("first", "relu"), ("between", "relu_1")])
def test_what_runs_again_after_a_layer_is_computed_again(path, tensor, run_twice, train_shard):
    found = _measure(*run_twice, train_shard)[path]
    expected = _measured_by_hand(run_twice[1], path, {tensor}, train_shard)
    assert _found(found) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert expected[0] > 1e-3
    assert found.signal > 3 * found.noise  # Each is compared with its own output: no call overwrites another's.


def test_a_layer_that_runs_twice_has_one_row_for_both_calls(run_twice, train_shard):
    found = [s for s in sensitivity.measure_layers(*run_twice, train_shard, 0, 36) if s.layer == "twice"]
    assert len(found) == 1
    expected = _measured_by_hand(run_twice[1], "twice", {"twice", "twice_1"}, train_shard)
    assert _found(found[0]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_layer_that_is_never_called_has_no_row(run_twice, train_shard):
    assert "unused" not in _measure(*run_twice, train_shard)


def test_parts_of_the_images_add_up(measured, fused_model, quantized, train_shard):
    parts = [_measure(fused_model, quantized, train_shard, *ends) for ends in ((0, 20), (20, 50))]
    for name, whole in measured.items():
        first, second = (part[name] for part in parts)
        assert first.num_images + second.num_images == whole.num_images == 36
        assert first.noise + second.noise == pytest.approx(whole.noise, rel=1e-4)
        assert first.num_correct_all_but + second.num_correct_all_but == whole.num_correct_all_but


def test_batches_add_up_and_each_is_reported(measured, fused_model, quantized, train_shard, monkeypatch):
    monkeypatch.setattr(sensitivity, "_MAX_PIXELS", 15 * 32 * 32)
    calls = []
    found = sensitivity.measure_layers(
        fused_model, quantized, train_shard, 0, 36, lambda done, total: calls.append((done, total))
    )
    assert calls == [(15, 36), (30, 36), (36, 36)]
    for sums in found:
        own, whole = (dataclasses.asdict(each) for each in (sums, measured[sums.layer]))
        names = [name for name, value in whole.items() if isinstance(value, float | int)]
        assert [own[name] for name in names] == pytest.approx([whole[name] for name in names], rel=1e-3, abs=1e-6)


def test_a_layer_of_uneven_channels_costs_most(fused_model, train_shard):
    uneven = copy.deepcopy(fused_model)
    victim, following = (uneven.get_submodule(f"features.2.conv.{number}.0") for number in range(2))
    with torch.no_grad():
        victim.weight[0] *= 1000.0  # One scale for all channels: the others become zero.
        victim.bias[0] *= 1000.0
        following.weight[0] /= 1000.0
    quantized = _quantize(uneven, scheme("default"), shards.open_shard(train_shard).inputs())
    found = sensitivity.measure_layers(uneven, quantized, train_shard, 0, 36)
    assert max(found, key=lambda sums: sums.divergence_only).layer == "features.2.conv.0.0"


def test_a_trained_model_is_measured_as_the_calibrated_one_that_it_starts_from(
    trained_model, fused_model, calibrated, train_shard
):
    trainable = fusion.fuse_model(trace(copy.deepcopy(trained_model), SHAPE), "qat")
    started = qat.start_from(trainable, calibrated("fbgemm"), scheme("fbgemm"))
    wanted, found = (
        _measure(fused_model, conversion.convert(model, scheme("fbgemm")), train_shard)
        for model in (calibrated("fbgemm"), started)
    )
    assert list(found) == list(wanted)
    for name, own in found.items():
        assert own.activation_max == pytest.approx(wanted[name].activation_max, rel=1e-4)
        assert own.num_correct_all_but == pytest.approx(wanted[name].num_correct_all_but, abs=1)


def test_layers_are_compared_with_float_and_not_with_a_model_of_corrected_biases(
    measured, fused_model, quantized, train_shard
):
    shifted = copy.deepcopy(quantized)
    with torch.no_grad():
        shifted.get_submodule("features.2.conv.0.0").bias += 5.0  # Like a bias correction, but larger.
    found = _measure(fused_model, shifted, train_shard)
    for path in ("x", "features.0.0", "features.3.conv.0.0"):
        assert found[path].divergence_only == measured[path].divergence_only, path
    assert found["x"].num_correct_int8 < found["x"].num_correct_float == measured["x"].num_correct_float
    # After it, "all but one layer" means those of the shifted model.
    assert found["features.3.conv.0.0"].num_correct_all_but < measured["features.3.conv.0.0"].num_correct_all_but
    assert found["features.2.conv.0.0"].divergence_only > 10 * measured["features.2.conv.0.0"].divergence_only
    assert found["features.2.conv.0.0"].noise > 10 * measured["features.2.conv.0.0"].noise


@pytest.fixture
def kept_float(fused_model, train_shard):
    """The quantized net with one layer in float."""
    kept = dataclasses.replace(scheme("default"), float_layers=("features.2.conv.0.0",))
    return _quantize(fused_model, kept, shards.open_shard(train_shard).inputs())


def test_behind_a_layer_kept_in_float_its_output_is_measured_and_offers_no_weight(fused_model, kept_float, train_shard):
    found = _measure(fused_model, kept_float, train_shard)
    assert "features.2.conv.0.0" not in found
    sums = found["features_2_conv_0_2"]
    assert (sums.weight_min, sums.weight_max) == (None, None)
    assert sums.activation_max > sums.activation_min
    assert sums.num_images == 36


def test_a_layer_kept_in_float_is_that_of_the_float_model_also_if_it_has_changed_since(
    fused_model, kept_float, train_shard
):
    # Its bias is corrected, and in training its weight learns, like those of int8 layers.
    before = _measure(fused_model, kept_float, train_shard)["features.3.conv.0.0"]
    with torch.no_grad():
        kept_float.get_submodule("features.2.conv.0.0").bias += 5.0
    after = _measure(fused_model, kept_float, train_shard)["features.3.conv.0.0"]
    assert after.num_correct_int8 < before.num_correct_int8
    assert after.num_correct_float == before.num_correct_float
    assert after.divergence_only == pytest.approx(before.divergence_only, rel=1e-3)


class _Branching(nn.Module):
    """Cannot be traced: it branches on values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.inside(x).relu() if x.mean() < 100 else x


class _AroundBranches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.part, self.last = nn.Conv2d(3, 8, 3, padding=1), _Branching(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.part(self.first(x).relu()).mean([2, 3]))


def test_a_model_with_a_part_that_cannot_be_traced_is_measured(train_shard):
    fused = fusion.fuse_model(trace(_AroundBranches(), SHAPE), "eval")
    quantized = _quantize(fused, scheme("default"), shards.open_shard(train_shard).inputs())
    found = _measure(fused, quantized, train_shard)
    right = [int(evaluation.evaluate(model, train_shard, 12).top1_correct.sum()) for model in (fused, quantized)]
    assert {(sums.num_correct_float, sums.num_correct_int8) for sums in found.values()} == {tuple(right)}
    assert {"first", "last"} <= set(found)
    assert 0 < found["first"].noise < 0.1 * found["first"].signal


def test_measuring_leaves_both_models_as_they_were(fused_model, quantized, train_shard):
    models = fused_model, quantized
    before = [copy.deepcopy(model.state_dict()) for model in models]
    modules = [dict(model.named_modules()) for model in models]
    sensitivity.measure_layers(fused_model, quantized, train_shard, 0, 12)
    for model, state, own in zip(models, before, modules, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert dict(model.named_modules()) == own
