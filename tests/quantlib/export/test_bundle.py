"""The document that a shipped file holds: what it says about itself."""

import io
import json
from dataclasses import fields
from pathlib import Path

import onnx
import pytest
import torch
from rows import file_info, model_info, preprocessing

from quantlib.data.normalization import Normalization
from quantlib.data.transforms import EvalTransform
from quantlib.errors import ModelError
from quantlib.export import bundle, onnx_draft, scripting, torch_export
from quantlib.export.bundle import Preprocessing
from quantlib.export.onnx import write_onnx
from quantlib.recipe.interface import FLOAT, Interface
from quantlib.runtimes import classifiers


@pytest.fixture(scope="module")
def contents(fused_model):
    """The files of a float model, by kind, as the store holds them."""
    draft = onnx_draft.draft(fused_model, (3, 32, 32))
    return {
        "torchscript": scripting.script(fused_model, None, (3, 32, 32)),
        "onnx": write_onnx(draft, fused_model, "onnxruntime"),
        "torch_export": torch_export.write(fused_model, (3, 32, 32)),
    }


KINDS = [
    ("torchscript", "a.pt", "torchscript"),
    ("onnx", "a.onnx", "onnxruntime"),
    ("onnx", "a.onnx", "openvino"),
    ("torch_export", "a.pt2", "torch_export"),
]
NAMES = {"a.pt": "torchscript", "a.onnx": "onnx", "a.pt2": "torch_export"}


@pytest.mark.parametrize(("kind", "name", "runtime"), KINDS)
def test_a_file_says_what_it_is_and_answers_as_it_did_without(kind, name, runtime, contents, val_inputs, tmp_path):
    if kind == "onnx":
        pytest.importorskip(runtime, reason=f"needs {runtime}")
    info = model_info(classes=["blå", "grün", "red"])
    (tmp_path / name).write_bytes(bundle.attach(contents[kind], kind, info))
    (tmp_path / "plain").write_bytes(contents[kind])
    assert bundle.read(tmp_path / name) == info
    expected = classifiers.open_model(tmp_path / "plain", runtime)(val_inputs)
    assert torch.equal(classifiers.open_model(tmp_path / name, runtime)(val_inputs), expected)


def test_a_program_of_executorch_holds_its_document_at_its_end(tmp_path):
    (tmp_path / "a.pte").write_bytes(bundle.attach(b"program", "executorch", model_info()))
    assert bundle.read(tmp_path / "a.pte") == model_info()
    assert (tmp_path / "a.pte").read_bytes().startswith(b"program")


def test_each_format_keeps_the_document_where_its_own_tools_find_it(contents):
    document = bundle.document(model_info()).decode()
    extra = {"quantflow.json": ""}
    torch.jit.load(io.BytesIO(bundle.attach(contents["torchscript"], "torchscript", model_info())), _extra_files=extra)
    assert extra["quantflow.json"].decode() == document
    program = bundle.attach(contents["torch_export"], "torch_export", model_info())
    torch.export.load(io.BytesIO(program), extra_files=extra)
    assert extra["quantflow.json"] == document
    model = onnx.load_from_string(bundle.attach(contents["onnx"], "onnx", model_info()))
    onnx.checker.check_model(model)
    assert {entry.key: entry.value for entry in model.metadata_props}["quantflow"] == document
    del model.metadata_props[:]
    assert model == onnx.load_from_string(contents["onnx"])


def test_the_same_document_gives_the_same_file(contents):
    for kind, content in contents.items():
        assert bundle.attach(content, kind, model_info()) == bundle.attach(content, kind, model_info())


def test_the_page_about_bundles_names_every_field():
    page = (Path(__file__).parents[3] / "docs" / "bundle.md").read_text()
    parts = (bundle.ModelInfo, bundle.FileInfo, bundle.Measured, bundle.Accuracy)
    names = [name for part in parts for name in part.model_fields]
    names += [field.name for part in (Preprocessing, Interface) for field in fields(part)]
    assert [name for name in names if f"`{name}`" not in page] == []
    assert f"schema {bundle.SCHEMA_VERSION}" in page


@pytest.mark.parametrize(
    "transform",
    [
        EvalTransform(resize=256, crop=(224, 200)),
        EvalTransform(resize=(24, 16), crop=(20, 12), interpolation="bicubic"),
        EvalTransform(resize=8, crop=(8, 8), interpolation="nearest", normalization=Normalization((0.3,), (0.4,))),
    ],
)
def test_a_transform_survives_the_document(transform):
    assert Preprocessing.of(transform).transform() == transform
    assert Preprocessing.of(transform).input_size == list(transform.input_shape)


def test_the_preprocessing_reads_as_a_sentence():
    grey = preprocessing(
        channel_order="L", resize=[24, 16], crop=[20, 12], interpolation="nearest", antialias=False, mean=[0.3], std=[1]
    )
    assert grey.text == (
        "grey, resized to 24 x 16 pixels (nearest), centre crop of 20 x 12, divided by 255, mean 0.3, standard "
        "deviation 1."
    )


def changed(**changes):
    """The document with some of its values replaced."""
    return json.dumps(json.loads(bundle.document(model_info())) | changes).encode()


WRONG = [
    (b"", "is damaged"),
    (b"[]", "is damaged"),
    (b"\xff", "is damaged"),
    (bundle.document(model_info())[:-40], "is damaged"),
    (changed(schema_version=None), "schema_version"),
    (changed(schema_version=3, files="elsewhere"), "written by a newer quantflow: .*schema 3.*up to 2. Upgrade"),
    (changed(classes=[]), "classes"),
    (changed(input_size=[1, 224, 224]), "do not fit together"),
    (changed(float_accuracy={"top1": float("nan")}), "is damaged"),
    (changed(files=[{**file_info().model_dump(), "name": "../a.onnx"}]), "files.0.name"),
    (changed(files=[{**file_info().model_dump(), "runtime": "tensorrt"}]), "files.0.runtime"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_a_damaged_or_newer_document_is_one_clear_error(content, message, tmp_path):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        bundle.read(tmp_path / "model.json")
    assert "\n" not in str(caught.value)


def test_a_document_that_says_nothing_of_its_ends_is_of_a_file_for_normalized_images(tmp_path):
    values = json.loads(changed())
    del values["interface"]
    (tmp_path / "model.json").write_text(json.dumps(values))
    assert bundle.read(tmp_path / "model.json").interface == FLOAT


def test_what_a_later_release_added_is_passed_over(tmp_path):
    (tmp_path / "model.json").write_bytes(changed(licence="MIT"))
    assert bundle.read(tmp_path / "model.json") == model_info()


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_a_file_that_is_cut_short_is_named(name, kind, contents, tmp_path):
    content = bundle.attach(contents[kind], kind, model_info())
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ModelError, match=f"{name} is damaged, or no"):
        bundle.read(tmp_path / name)


@pytest.mark.parametrize(("name", "kind"), [*NAMES.items(), ("a.pte", "torch_export")])
def test_a_file_without_a_document_is_named_with_what_to_do(name, kind, contents, tmp_path):
    (tmp_path / name).write_bytes(contents[kind])
    with pytest.raises(ModelError, match="has no quantflow document.*quantflow resume RUN"):
        bundle.read(tmp_path / name)


@pytest.mark.parametrize("name", ["none.onnx", "folder.pt", "weights.pth"])
def test_what_is_no_model_file_is_named(name, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ModelError, match=f"{name} (is no model|cannot be read)"):
        bundle.read(tmp_path / name)
