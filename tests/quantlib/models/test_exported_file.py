"""Files of torch.export.save: what is read, and that nothing in them runs."""

import io
import pickle
import re

import exported
import pytest
import torch
from torch import nn

from quantlib.errors import ModelError
from quantlib.models.exported_file import read_program, read_state

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Net(nn.Module):
    """One of each kind of tensor: parameters, buffers of both sorts, a constant of the code."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("shift", torch.tensor([0.5]), persistent=False)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3)) * self.scale + self.shift
        return self.linear(x) + torch.tensor([1.0, 0.0, 0.0, 0.0, 7.0])


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def path(net, tmp_path):
    exported.write(net, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_every_tensor_is_read_under_its_name(net, path):
    state = read_state(str(path))

    own = net.state_dict() | {"shift": net.shift}
    assert all(torch.equal(state.pop(name), value) for name, value in own.items())
    assert [value.tolist() for value in state.values()] == [[1, 0, 0, 0, 7]]


def test_tensors_that_share_their_memory_are_read_in_full(tmp_path):
    base = nn.Linear(4, 6)
    net = nn.Module()
    net.conv, net.whole, net.turned = nn.Conv2d(3, 4, 3), base, nn.Linear(6, 4)
    net.turned.weight = nn.Parameter(base.weight.detach().t())
    net.forward = lambda x: net.turned(net.whole(net.conv(x).mean((2, 3))))

    state = read_state(exported.write(net.eval(), tmp_path / "net.pt2"))

    assert torch.equal(state["turned.weight"], base.weight.t())
    assert torch.equal(state["whole.weight"], base.weight)


def test_where_a_model_was_exported_is_not_in_its_graph(path):
    assert "stack_trace" in str(exported.read_json(path, MODEL))
    assert "stack_trace" not in read_program(str(path))


def _pickled(path, kind, name, content):
    """Changes that put a pickle in the place of a tensor."""
    config = exported.read_json(path, f"model_{kind}_config.json")
    config["config"][name]["use_pickle"] = True
    return {
        f"data/{kind}/model_{kind}_config.json": config,
        f"data/{kind}/{config['config'][name]['path_name']}": content,
    }


@pytest.mark.parametrize("place", ["weight", "constant", "custom_obj", "opaque_obj", "old weights", "old constants"])
def test_a_pickle_in_place_of_a_tensor_is_refused_and_does_not_run(path, tmp_path, place):
    attack = Attack(tmp_path / "ran")
    entry = {"path_name": f"{place}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    exported.alter(
        path,
        {
            "weight": _pickled(path, "weights", "conv.weight", _saved(attack)),
            "constant": _pickled(path, "constants", "shift", _saved(attack)),
            "custom_obj": {CONSTANTS: {"config": {"x": entry}}, "data/constants/custom_obj_0": _saved(attack)},
            "opaque_obj": {CONSTANTS: {"config": {"x": entry}}, "data/constants/opaque_obj_0": pickle.dumps(attack)},
            "old weights": {"data/weights/model.pt": _saved(attack)},
            "old constants": {"data/constants/model.pt": _saved(attack)},
        }[place],
    )

    read_program(str(path))
    with pytest.raises(ModelError, match=r"as a? ?pickles?, which .*not read") as error:
        read_state(str(path))

    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_pickled_example_inputs_and_code_in_strings_are_not_looked_at(net, path, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    model = exported.read_json(path, MODEL) | {"guards_code": [code]}
    for value in model["graph_module"]["graph"]["sym_int_values"].values():
        value["as_expr"]["expr_str"] = code
    model["range_constraints"] = {code: {"min_val": 1, "max_val": 2}}
    exported.alter(
        path, {MODEL: model, "data/sample_inputs/model.pt": _saved(Attack(tmp_path / "ran")), "extra/x.py": code}
    )

    assert read_program(str(path))
    assert torch.equal(read_state(str(path))["conv.weight"], net.conv.weight)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickle_is_refused_and_does_not_run(tmp_path):
    for name, content in (
        ("a.pt2", _saved(Attack(tmp_path / "ran"))),
        ("b.pt2", pickle.dumps(Attack(tmp_path / "ran"))),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match="Save it again"):
            read_program(str(tmp_path / name))

    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"No file '.*nowhere\.pt2'"):
        read_program(str(tmp_path / "nowhere.pt2"))


def test_a_file_cut_short_or_with_a_changed_byte_is_damaged(path):
    content = path.read_bytes()
    weight = exported.read_json(path, "model_weights_config.json")["config"]["linear.weight"]["path_name"]
    place = content.index(f"/data/weights/{weight}".encode()) + 80
    for damaged in (content[: len(content) // 2], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="is damaged, or no file of torch.export.save"):
            read_state(str(path))


@pytest.mark.parametrize("content", [b"{", {}, {"graph_module": 1, "schema_version": {"major": 8}}])
def test_a_graph_that_is_not_one_is_damaged(path, content):
    exported.alter(path, {MODEL: content})

    with pytest.raises(ModelError, match="is damaged, or no file of torch.export.save"):
        read_program(str(path))


def test_a_size_beyond_what_is_stored_is_damaged(path):
    content = exported.read_json(path, "model_weights_config.json")
    content["config"]["linear.weight"]["tensor_meta"]["sizes"][0] = {"as_int": 10**6}
    exported.alter(path, {WEIGHTS: content})

    with pytest.raises(ModelError, match="is damaged"):
        read_state(str(path))


def test_the_format_of_another_torch_is_named(path):
    exported.alter(
        path, {MODEL: exported.read_json(path, MODEL) | {"schema_version": {"major": 9}, "torch_version": "3.0"}}
    )

    with pytest.raises(ModelError, match=re.escape(f"by torch 3.0 in format 9, and torch {torch.__version__} reads")):
        read_program(str(path))


def test_several_models_in_a_file_are_counted(path):
    exported.alter(path, {"models/other.json": exported.read_json(path, MODEL)})

    with pytest.raises(ModelError, match="holds 2 exported models, and must hold one"):
        read_program(str(path))
