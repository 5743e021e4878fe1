"""MobileNetV2, its weights, and a user's own architectures."""

import itertools
import json
import pickle
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

from quantlib.errors import MachineError, ModelError, RecipeError
from quantlib.models import mobilenet_v2, registry
from quantlib.models.source import ModelInput
from quantlib.models.weights import load_weights, read_weights

Stir = Callable[[nn.Module], nn.Module]
module_numbers = itertools.count()


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Writes an importable module, and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        name = f"users_model_{next(module_numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def _source(architecture="mobilenet_v2", arguments="{}", weights="train"):
    return ModelInput(architecture, arguments, weights, fingerprint="", code="")


# The architecture


def test_keys_of_the_state_dict_are_torchvisions():
    torchvisions = torchvision_mobilenet_v2(weights=None).state_dict()
    own = mobilenet_v2.mobilenet_v2().state_dict()

    assert list(own) == list(torchvisions)
    assert [value.shape for value in own.values()] == [value.shape for value in torchvisions.values()]


@pytest.mark.parametrize("width_mult", [0.35, 1.4])
def test_torchvisions_weights_give_torchvisions_logits(stir_batch_norm, width_mult):
    torch.manual_seed(1)
    theirs = stir_batch_norm(torchvision_mobilenet_v2(weights=None, num_classes=7, width_mult=width_mult)).eval()
    own = mobilenet_v2.mobilenet_v2(num_classes=7, width_mult=width_mult).eval()
    load_weights(own, theirs.state_dict(), "torchvision")
    for module in list(theirs.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU())
    x = torch.randn(2, 3, 64, 64)

    with torch.inference_mode():
        expected, got = theirs(x), own(x)

    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_mobilenet_v2_has_the_papers_3_5_million_parameters():
    model = mobilenet_v2.mobilenet_v2()

    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872  # torchvision documents this number
    assert sum(1 for module in model.modules() if isinstance(module, mobilenet_v2.InvertedResidual)) == 17
    # Every repeat except a row's first is added to its input: 0 + 1 + 2 + 3 + 2 + 2 + 0.
    assert sum(getattr(module, "adds", False) for module in model.modules()) == 10


@pytest.mark.parametrize(
    ("channels", "divisor", "expected"),
    [
        (32, 8, 32),
        (32 * 1.4, 8, 48),  # 44.8 lies nearer to 48 than to 40
        (1, 8, 8),  # never nothing
        (12, 8, 16),  # ties go up
        (11.99, 8, 16),  # 8 is nearer, and more than a tenth less
        (8.8, 8, 8),  # 8 is 90.9% of it
        (8.9, 8, 16),  # 8 is 89.9% of it
        (33, 1, 33),
        (33.4, 1, 33),
    ],
)
def test_channels_are_rounded_to_the_nearest_multiple_and_never_below_90_percent(channels, divisor, expected):
    assert mobilenet_v2.round_channels(channels, divisor) == expected


@pytest.mark.parametrize(("width_mult", "first", "last"), [(0.5, 16, 1280), (1.0, 32, 1280), (1.4, 48, 1792)])
def test_width_multiplier_never_narrows_the_last_convolution(width_mult, first, last):
    model = mobilenet_v2.mobilenet_v2(num_classes=2, width_mult=width_mult, inverted_residual_setting=[[1, 16, 1, 1]])

    assert model.features[0][0].out_channels == first
    assert model.classifier[1].in_features == last


def test_blocks_follow_the_setting():
    model = mobilenet_v2.mobilenet_v2(num_classes=2, inverted_residual_setting=[[1, 32, 2, 1], [3, 40, 2, 2]])
    blocks = list(model.features)[1:-1]
    convolutions = [[conv for conv in block.modules() if isinstance(conv, nn.Conv2d)] for block in blocks]

    assert [len(block) for block in convolutions] == [2, 2, 3, 3]  # no expansion, no expanding convolution
    assert [block[-2].stride for block in convolutions] == [(1, 1), (1, 1), (2, 2), (1, 1)]
    assert [block[-2].groups for block in convolutions] == [32, 32, 96, 120]
    assert [block.adds for block in blocks] == [True, True, False, True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"inverted_residual_setting": []},
        {"inverted_residual_setting": [[1, 16, 1]]},
        {"inverted_residual_setting": [[1, 16, 0, 1]]},
        {"inverted_residual_setting": [[1, -16, 1, 1]]},
        {"inverted_residual_setting": [[1, 16, 1, 3]]},
        {"inverted_residual_setting": [[1, "16", 1, 1]]},
        {"inverted_residual_setting": [1, 16, 1, 1]},
        {"num_classes": 0},
        {"num_classes": "ten"},
        {"width_mult": 0},
        {"width_mult": float("nan")},
        {"width_mult": "wide"},
        {"round_nearest": 0},
        {"round_nearest": 0.5},
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ModelError, match=next(iter(arguments)) + "|stride 3"):
        registry.build("mobilenet_v2", arguments)


def test_an_argument_that_the_architecture_does_not_take_is_named_with_those_it_takes():
    with pytest.raises(ModelError, match=r"'width'.*width_mult"):
        registry.build("mobilenet_v2", {"width": 0.5})


# Weights


@pytest.fixture
def weights_file(tmp_path, tiny_model):
    torch.save(tiny_model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_weights_are_loaded_into_the_named_architecture(weights_file, tiny_model, tiny_arguments):
    arguments = {name: value for name, value in tiny_arguments.items() if name != "num_classes"}
    source = _source(arguments=json.dumps(arguments), weights=str(weights_file))

    model, header = registry.from_input(source, num_classes=3, input_shape=(3, 32, 32), seed=0)

    assert header.arguments == tiny_arguments  # num_classes comes from the data
    assert not model.training
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny_model.state_dict().values(), strict=True)
    )


def test_initial_weights_are_a_function_of_the_seed():
    same, again, other = (registry.from_input(_source(), 2, (3, 32, 32), seed)[0].state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["features.0.0.weight"], other["features.0.0.weight"])


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_a_checkpoint_that_wraps_the_state_dict_is_unwrapped(tmp_path, tiny_model, name):
    torch.save({name: tiny_model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")

    state = read_weights(str(tmp_path / "checkpoint.pth"), "mobilenet_v2")

    assert state.keys() == tiny_model.state_dict().keys()


@pytest.fixture
def safetensors_file(tmp_path, tiny_model):
    save_file(tiny_model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_weights_in_a_safetensors_file_are_read(safetensors_file, tiny_model, tiny_arguments):
    source = _source(arguments=json.dumps(tiny_arguments), weights=str(safetensors_file))

    model, _ = registry.from_input(source, num_classes=3, input_shape=(3, 32, 32), seed=1)

    own, read = tiny_model.state_dict(), model.state_dict()
    assert own.keys() == read.keys()
    assert all(torch.equal(own[name], read[name]) for name in own)


def test_weights_of_another_shape_in_a_safetensors_file_are_refused(safetensors_file, tiny_arguments):
    source = _source(arguments=json.dumps(tiny_arguments | {"num_classes": 5}), weights=str(safetensors_file))

    with pytest.raises(ModelError, match=r"weights\.safetensors' have the wrong shape: classifier\.1\.\w+ is \[3"):
        registry.from_input(source, num_classes=5, input_shape=(3, 32, 32), seed=0)


@pytest.mark.parametrize("name", ["resnet34", "mobilenet_v2"])
def test_weights_of_another_architecture_are_refused_with_the_name_of_theirs(tmp_path, name):
    torch.save(models.get_model(name, num_classes=3).state_dict(), tmp_path / "weights.pth")
    source = _source(architecture="torchvision:resnet18", weights=str(tmp_path / "weights.pth"))
    theirs = "mobilenet_v2" if name == "mobilenet_v2" else f"torchvision:{name}"

    with pytest.raises(ModelError, match=f'do not fit the architecture.* They look like those of "{theirs}"'):
        registry.from_input(source, num_classes=3, input_shape=(3, 32, 32), seed=0)


def test_weights_of_nothing_that_is_known_are_refused_without_a_guess(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "weights.pth")
    source = _source(architecture="torchvision:resnet18", weights=str(tmp_path / "weights.pth"))

    with pytest.raises(ModelError, match="do not fit the architecture") as refused:
        registry.from_input(source, num_classes=3, input_shape=(3, 32, 32), seed=0)
    assert "look like" not in str(refused.value)


def _cut_short(content):
    return content[: len(content) // 2]


def _of_another_length(content):
    return (2**40).to_bytes(8, "little") + content[8:]


@pytest.mark.parametrize("damage", [_cut_short, _of_another_length, lambda _: b"", lambda _: b"an HTML page: 404"])
def test_a_damaged_safetensors_file_is_refused(safetensors_file, damage):
    safetensors_file.write_bytes(damage(safetensors_file.read_bytes()))

    with pytest.raises(ModelError, match=r"weights\.safetensors' cannot be read as a state_dict: \S"):
        read_weights(str(safetensors_file), "mobilenet_v2")


def test_a_pickle_that_is_called_safetensors_is_refused_and_does_not_run(tmp_path):
    victim, weights = tmp_path / "code_ran", tmp_path / "weights.safetensors"
    torch.save({"weight": _Malicious(victim)}, weights)

    with pytest.raises(ModelError, match="cannot be read as a state_dict"):
        read_weights(str(weights), "mobilenet_v2")

    assert not victim.exists()


def test_missing_weights_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere\.pth"):
        read_weights(str(tmp_path / "nowhere.pth"), "mobilenet_v2")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"a": torch.zeros(1), "b": "text"}, {0: torch.zeros(1)}])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")

    with pytest.raises(ModelError, match="not a state_dict of tensors"):
        read_weights(str(tmp_path / "weights.pth"), "mobilenet_v2")


def test_a_file_that_torch_cannot_read_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"an HTML page that said 404")

    with pytest.raises(ModelError, match="cannot be read as a state_dict"):
        read_weights(str(tmp_path / "weights.pth"), "mobilenet_v2")


def test_a_pickled_module_is_refused(tmp_path, tiny_model):
    torch.save(tiny_model, tmp_path / "model.pth")

    with pytest.raises(ModelError, match="whole pickled models are refused"):
        read_weights(str(tmp_path / "model.pth"), "mobilenet_v2")


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, as_zip):
    victim, weights = tmp_path / "code_ran", tmp_path / "weights.pth"
    torch.save({"weight": _Malicious(victim)}, weights, _use_new_zipfile_serialization=as_zip)

    with pytest.raises(ModelError, match="cannot be read as a state_dict"):
        read_weights(str(weights), "mobilenet_v2")

    assert not victim.exists()
    torch.load(weights, weights_only=False)  # The trap does work.
    assert victim.exists()


def test_a_plain_pickle_that_would_run_code_does_not_run(tmp_path):
    victim, weights = tmp_path / "code_ran", tmp_path / "weights.pth"
    weights.write_bytes(pickle.dumps(_Malicious(victim)))

    with pytest.raises(ModelError):
        read_weights(str(weights), "mobilenet_v2")

    assert not victim.exists()


def test_weights_of_another_shape_name_the_tensor_and_both_shapes(tiny_model):
    state = tiny_model.state_dict() | {"classifier.1.weight": torch.zeros(10, 1280)}

    with pytest.raises(ModelError, match=r"classifier\.1\.weight is \[10, 1280\].*\[3, 1280\].*num_classes"):
        load_weights(tiny_model, state, "weights.pth")


def test_weights_with_missing_and_unknown_keys_name_them(tiny_model):
    state = tiny_model.state_dict()
    state["module.bias"] = state.pop("classifier.1.bias")

    with pytest.raises(ModelError, match=r"1 missing \(classifier\.1\.bias\); 1 unknown \(module\.bias\)"):
        load_weights(tiny_model, state, "weights.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["features.0.0.weight", "features.0.1.running_var"])
def test_weights_that_are_not_finite_are_refused(tiny_model, name, value):
    state = {key: tensor.clone() for key, tensor in tiny_model.state_dict().items()}
    state[name].view(-1)[-1] = value

    with pytest.raises(ModelError, match=f"NaN or infinity in {name}"):
        load_weights(tiny_model, state, "weights.pth")


def test_an_unknown_torchvision_name_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match=r"'IMAGENET'.*IMAGENET1K_V1, IMAGENET1K_V2"):
        read_weights("torchvision:IMAGENET", "mobilenet_v2")


def test_an_architecture_that_torchvision_does_not_have_has_no_torchvision_weights():
    with pytest.raises(ModelError, match="torchvision has no model"):
        read_weights("torchvision:DEFAULT", "package.module:function")


def test_a_download_without_a_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    with pytest.raises(MachineError, match=r"no route to host.*checkpoints"):
        read_weights("torchvision:IMAGENET1K_V1", "mobilenet_v2")


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="the extra quantflow[timm] is not installed")


def test_an_unknown_timm_tag_is_refused_with_those_there_are(timm):
    with pytest.raises(ModelError, match=r"timm has no weights 'in1k' for 'convnext_atto'\. Allowed: d2_in1k\.$"):
        read_weights("timm:in1k", "timm:convnext_atto")


def test_tags_of_a_timm_model_whose_name_only_begins_the_same_are_not_its_own(timm):
    assert timm.list_pretrained("convnext_atto_ols.a2_in1k")
    with pytest.raises(ModelError, match=r"'a2_in1k' for 'convnext_atto'"):
        read_weights("timm:a2_in1k", "timm:convnext_atto")


def test_a_model_that_timm_has_no_weights_for_says_so(timm):
    with pytest.raises(ModelError, match=r"timm has no weights 'd2_in1k' for 'no_such_net'\. Allowed: none\.$"):
        read_weights("timm:d2_in1k", "timm:no_such_net")


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "torchvision:convnext_tiny", "package.module:convnext_atto"])
def test_an_architecture_that_is_not_timms_has_no_timm_weights(architecture):
    with pytest.raises(ModelError, match=rf"'timm:d2_in1k' are for a model of timm, .* is '{architecture}'"):
        read_weights("timm:d2_in1k", architecture)


def test_timm_that_is_missing_is_named_where_its_weights_need_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MachineError, match=r"'timm:d2_in1k' need timm, .*: pip install quantflow\[timm\]"):
        read_weights("timm:d2_in1k", "timm:convnext_atto")


def test_timms_weights_are_those_of_the_tag_and_fit_timms_model(timm, monkeypatch):
    made = timm.create_model("resnet10t")
    asked = []

    def create(name, *, pretrained):
        asked.append((name, pretrained))
        return made

    with monkeypatch.context() as without_network:
        without_network.setattr(timm, "create_model", create)
        state = read_weights("timm:c3_in1k", "timm:resnet10t")
    assert asked == [("resnet10t.c3_in1k", True)]
    load_weights(registry.build("timm:resnet10t", {}), state, "timm:c3_in1k")


def test_a_download_from_timm_without_a_network_says_what_to_do(timm, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(MachineError, match=r"timm:c3_in1k are not .*\(no route to host\)\. Download .* model\.weights"):
        read_weights("timm:c3_in1k", "timm:resnet10t")


# A user's own architecture


def test_a_users_architecture_is_built_with_the_number_of_classes(write_module):
    name = write_module(
        "from torch import nn\n"
        "def small(num_classes, channels=4):\n"
        "    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(channels, num_classes))\n"
    )

    model, header = registry.from_input(
        _source(f"{name}:small", '{"channels": 6}'), num_classes=5, input_shape=(3, 32, 32), seed=0
    )

    registry.check_logits(model, num_classes=5, input_shape=(3, 16, 16))
    assert header.arguments == {"num_classes": 5, "channels": 6}


def test_an_architecture_without_num_classes_is_not_given_it(write_module):
    name = write_module("from torch import nn\ndef fixed():\n    return nn.Linear(1, 1)\n")

    assert (
        registry.from_input(_source(f"{name}:fixed"), num_classes=5, input_shape=(3, 32, 32), seed=0)[1].arguments == {}
    )


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_the_head_of_a_published_architecture_follows_the_data(name):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="the extra quantflow[timm] is not installed")
    model, header = registry.from_input(_source(name), num_classes=7, input_shape=(3, 32, 32), seed=0)
    registry.check_logits(model, num_classes=7, input_shape=(3, 32, 32))
    assert header.arguments == {"num_classes": 7}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:resnet81", r"torchvision has no classifier 'resnet81'.*resnet18"),
        ("torchvision:maskrcnn_resnet50_fpn", "torchvision has no classifier"),
        ("timm:resnet10x", r"timm has no model 'resnet10x'.*resnet10t"),
    ],
)
def test_an_unknown_name_of_torchvision_or_timm_is_refused_with_the_nearest(name, said):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="the extra quantflow[timm] is not installed")
    with pytest.raises(RecipeError, match=said):
        registry.find_architecture(name)


def test_timm_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MachineError, match=r"needs timm, which is not installed: pip install quantflow\[timm\]"):
        registry.find_architecture("timm:resnet10t")


def test_an_unknown_architecture_is_refused_with_those_that_are_known():
    with pytest.raises(RecipeError, match=r"'resnet'.*mobilenet_v2.*package\.module:function"):
        registry.find_architecture("resnet")


@pytest.mark.parametrize("function", ["absent", "number"])
def test_a_name_that_is_not_a_users_function_is_refused(write_module, function):
    name = f"{write_module('number = 3')}:{function}"

    with pytest.raises(RecipeError, match=rf"model\.architecture = '{name}'"):
        registry.find_architecture(name)


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="no_such_package"):
        registry.find_architecture("no_such_package.models:net")


def test_an_architecture_that_is_no_module_is_refused(write_module):
    name = write_module("def net():\n    return 'a net'\n")

    with pytest.raises(ModelError, match=r"returned a str"):
        registry.build(f"{name}:net", {})


def test_a_model_with_more_or_fewer_classes_than_the_data_is_refused(tiny_model):
    with pytest.raises(ModelError, match=r"\[1, 3\] for one image, and the data has 10 classes"):
        registry.check_logits(tiny_model, num_classes=10, input_shape=(3, 32, 32))


def test_a_model_that_gives_no_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ModelError, match="gives tuple"):
        registry.check_logits(Pair(), num_classes=10, input_shape=(3, 32, 32))


def test_a_model_that_cannot_take_the_crop_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))

    registry.check_logits(model, num_classes=10, input_shape=(3, 8, 8))
    with pytest.raises(ModelError, match=r"16 x 16 pixels.*data\.crop"):
        registry.check_logits(model, num_classes=10, input_shape=(3, 16, 16))


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_weights_of_a_model_that_was_trained_in_parallel_are_its_own(prefix, tmp_path):
    state = {f"{prefix}layer.weight": torch.zeros(2), f"{prefix}layer.bias": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    assert sorted(read_weights(str(tmp_path / "weights.pth"), "mobilenet_v2")) == ["layer.bias", "layer.weight"]


def test_what_a_users_function_raises_is_reported_with_its_location(tmp_path, monkeypatch):
    (tmp_path / "my_failing_net.py").write_text("def build(depth=1):\n    raise ValueError('no such depth')\n")
    (tmp_path / "my_broken_net.py").write_text("def build(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ModelError, match=r"my_failing_net:build raised ValueError: no such depth \(.*my_failing_net.py"
    ):
        registry.build("my_failing_net:build", {})
    with pytest.raises(
        RecipeError, match=r"cannot be imported: its module raised SyntaxError.*my_broken_net.py, line 1"
    ):
        registry.find_architecture("my_broken_net:build")
