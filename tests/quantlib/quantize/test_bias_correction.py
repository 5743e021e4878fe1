import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET
from quantlib.graph import fusion
from quantlib.models import checkpoint, mobilenet_v2
from quantlib.models.checkpoint import Header
from quantlib.quantize import bias_correction, conversion, preparation, simulation, stored
from quantlib.recipe.scheme import Scheme

SETTING = [[1, 8, 1, 1], [3, 8, 2, 2]]
SCHEME = Scheme(observer="minmax", weights="per_tensor", activation_bits=7)


@pytest.fixture
def shard(tmp_path):
    torch.manual_seed(0)
    with (tmp_path / "shard").open("wb") as file:
        pixels = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8).numpy()
        shards.save(pixels, torch.zeros(24).long().numpy(), IMAGENET, file)
    return tmp_path / "shard"


@pytest.fixture
def calibrated(shard):
    torch.manual_seed(0)
    net = mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.1, 4)  # So uneven that int8 weights per tensor shift the outputs.
            module.bias.data.normal_(0, 0.5)
    prepared = preparation.prepare(fusion.fuse_model(net.eval(), "eval"), SCHEME, "eval")
    with torch.inference_mode():
        prepared(next(iter(shards.batches(shard, 24)))[0])
    return prepared


def mean_logits(model, shard):
    with torch.inference_mode():
        return model(next(iter(shards.batches(shard, 24)))[0]).mean(0)


def test_corrected_biases_bring_the_mean_logits_back(calibrated, shard):
    wanted = mean_logits(calibrated, shard)
    before = mean_logits(simulation.simulate(calibrated, "eval", "both"), shard)
    corrected = bias_correction.correct_bias(calibrated, [shard])
    after = mean_logits(simulation.simulate(corrected, "eval", "both"), shard)
    # What is left is the rounding of the logits themselves.
    assert (after - wanted).abs().max() < 0.25 * (before - wanted).abs().max()


def test_a_corrected_model_handed_over_converts_to_the_bytes_of_one_read_back(calibrated, shard, engine):
    arguments = {"num_classes": 4, "width_mult": 0.25, "inverted_residual_setting": SETTING}
    header = Header(architecture="mobilenet_v2", arguments=arguments, code="", input_shape=(3, 16, 16))
    header = replace(header, fused="eval", scheme=SCHEME)
    content = stored.hand_over(bias_correction.correct_bias(calibrated, [shard]), header)
    handed_over, read_back = (conversion.convert(stored.open_model(content)[0], engine) for _ in range(2))
    header = replace(header, engine=engine)
    assert checkpoint.save(handed_over, header) == checkpoint.save(read_back, header)


def test_the_mean_behind_relu_is_what_is_corrected(calibrated, shard):
    corrected = bias_correction.correct_bias(calibrated, [shard])
    behind: dict[str, torch.Tensor] = {}
    models_ = {
        "float": calibrated,
        "before": simulation.simulate(calibrated, "eval", "both"),
        "after": simulation.simulate(corrected, "eval", "both"),
    }
    for name, model in models_.items():
        layer = model.features[0][0][0]  # Its inputs are the same in all three, apart from rounding.
        layer.register_forward_hook(
            lambda _m, _i, output, name=name: behind.update({name: output.relu().mean((0, 2, 3))})
        )
        mean_logits(model, shard)
    assert (behind["after"] - behind["float"]).abs().max() < 0.05 * (behind["before"] - behind["float"]).abs().max()


def test_correct_bias_changes_biases_alone_and_only_in_its_copy(calibrated, shard):
    before = copy.deepcopy(calibrated.state_dict())
    corrected = bias_correction.correct_bias(calibrated, [shard]).state_dict()
    changed = {name for name, value in corrected.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.endswith("bias") for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in calibrated.state_dict().items())


def test_behind_relu_only_active_values_count():
    output = torch.tensor([[-50.0, 1.0, 2.0, 3.0]]).view(4, 1, 1, 1)
    wanted = torch.tensor([[[2.25]]])  # The mean after ReLU if each of the three active values were one larger.
    assert torch.allclose(bias_correction._shift(output, wanted, relu=True), torch.tensor([[[1.0]]]))
