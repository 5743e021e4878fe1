"""`quantflow export` and `quantflow predict`."""

import json
import shutil
import sys

import harness
import pandas as pd
import pytest
import torch
import traces
from click.testing import CliRunner
from dashboard_driver import own_environment
from PIL import Image

from flows.cli import commands, outcome
from quantlib.export import bundle
from quantlib.runtimes import available


@pytest.fixture(autouse=True)
def _as_before():
    """Classifying in this process sets torch's engine, and its threads' count is the tests' own."""
    engine = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = engine


@pytest.fixture
def own_bundle(exported, tmp_path):
    """A copy of the bundle that a test may change."""
    return shutil.copytree(exported, tmp_path / "own")


@pytest.fixture
def quantflow(tmp_path, monkeypatch):
    """Runs a command line in an empty folder; returns (exit status, output)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        result = CliRunner().invoke(commands.main, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output

    return call


def test_export_writes_the_winner_and_says_what_to_do_with_it(undisturbed, quantflow, tmp_path):
    home, _ = undisturbed
    status, said = quantflow("export", harness.run_id_of(home), "--to", "digits", "--home", home, "--float")
    assert status == 0, said
    assert "float.onnx" in said
    assert (tmp_path / "digits" / "model.json").is_file()
    assert "python digits/predict.py IMAGE" in said


def test_export_of_an_unknown_run_is_wrong_input(undisturbed, quantflow, tmp_path):
    home, _ = undisturbed
    status, said = quantflow("export", "nope", "--to", "digits", "--home", home)
    assert status == outcome.WRONG_INPUT
    assert f"The newest are: {harness.run_id_of(home)}" in said
    assert list(tmp_path.iterdir()) == []


def top5_of(home, variant):
    table = pd.read_parquet(home / "reports" / "predictions")
    return [[str(index) for index in top5] for top5 in table[table.variant == variant].top5]


def test_a_folder_of_images_gets_the_answers_of_the_table_predictions(
    undisturbed, exported, digits, quantflow, tmp_path
):
    status, said = quantflow("predict", exported, digits, "--to", "out.parquet")
    assert status == 0, said
    assert "60 images was written to out.parquet" in said
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert list(found.columns) == ["image", "class", "probability", "top5", "top5_probabilities"]
    assert [list(top5) for top5 in found.top5] == top5_of(undisturbed[0], bundle.read(exported / "model.json").variant)
    assert list(found["class"]) == [top5[0] for top5 in found.top5]
    assert list(found.image) == sorted(str(path) for path in digits.iterdir())
    assert all(probabilities.sum() <= 1 + 1e-6 for probabilities in found.top5_probabilities)


def test_every_file_of_a_bundle_and_of_a_run_can_be_asked_alone(undisturbed, exported, digits, quantflow):
    run = undisturbed[0] / "models" / harness.run_id_of(undisturbed[0])
    files = [exported / file.name for file in bundle.read(exported / "model.json").files]
    assert {file.suffix for file in files} == {".pt", ".onnx"}
    for model in (*files, exported / "model.json", run / "float.pt", run / "float.onnx"):
        status, said = quantflow("predict", model, digits / "00.png", "--json")
        assert status == 0, said
        (answer,) = json.loads(said)
        assert len(answer["classes"]) == len(answer["probabilities"]) == 5
        assert answer["image"] == str(digits / "00.png")


def test_one_image_gets_five_lines_and_several_get_one_each(undisturbed, exported, digits, quantflow):
    variant = bundle.read(exported / "model.json").variant
    (first, second, *_) = top5_of(undisturbed[0], variant)
    status, said = quantflow("predict", exported, digits / "00.png")
    lines = [line.split() for line in said.splitlines() if ".png" in line]
    assert status == 0
    assert [line[1] for line in lines] == first
    said = quantflow("predict", exported, digits / "00.png", digits / "01.png")[1]
    lines = [line.split() for line in said.splitlines() if ".png" in line]
    assert [line[1] for line in lines] == [first[0], second[0]]
    assert all(line[2].endswith("%") for line in lines)


def test_names_of_classes_are_not_markup(own_bundle, digits, quantflow):
    info = bundle.read(own_bundle / "model.json").model_copy(update={"classes": ["[red]"] * 10})
    (own_bundle / "SHA256SUMS").unlink()
    (own_bundle / "model.json").write_bytes(bundle.document(info))
    assert quantflow("predict", own_bundle, digits / "00.png")[1].count("[red]") == 5


@pytest.mark.slow
@pytest.mark.skipif(traces.MISSING is not None, reason=str(traces.MISSING))
def test_predict_reaches_nothing_outside_this_machine(exported, digits, tmp_path):
    for file in bundle.read(exported / "model.json").files:
        command = [sys.executable, "-m", "flows.cli", "predict", str(exported / file.name), str(digits / "00.png")]
        seen = traces.trace(command, tmp_path / "trace", cwd=tmp_path, env=own_environment(OMP_NUM_THREADS="1"))
        assert seen.returncode == 0, seen.said
        assert seen.foreign() == []


def remove_document(place):
    (place / "model.json").unlink()


def damage_document(place):
    (place / "model.json").write_bytes((place / "model.json").read_bytes().replace(b"bilinear", b"biLinear"))


def damage_a_file(place):
    path = place / bundle.read(place / "model.json").files[0].name
    path.write_bytes(path.read_bytes()[:-1])


def remove_the_files(place):
    for path in (*place.glob("*.pt"), *place.glob("*.onnx")):
        path.unlink()


def write_document(place, **changes):
    (place / "SHA256SUMS").unlink()
    document = json.loads((place / "model.json").read_text())
    (place / "model.json").write_text(json.dumps(document | changes))


def make_newer(place):
    write_document(place, schema_version=9)


def name_too_few_classes(place):
    write_document(place, classes=["a", "b"])


def make_for_another_runtime(place):
    document = json.loads((place / "model.json").read_text())
    write_document(place, files=[file | {"runtime": "openvino"} for file in document["files"]])


SPOILT = [
    (remove_document, "is no bundle: it has no model.json"),
    (damage_document, "model.json is damaged: its SHA-256 is"),
    (damage_a_file, "is damaged: its SHA-256 is"),
    (remove_the_files, "does not load in"),
    (make_newer, "was written by a newer quantflow"),
    (name_too_few_classes, "gives 10 numbers per image, and its document names 2 classes"),
    (make_for_another_runtime, "is for openvino, which is not installed"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_a_bundle_that_is_spoilt_is_one_clear_error(spoil, message, own_bundle, digits, quantflow, monkeypatch):
    spoil(own_bundle)
    if spoil is make_for_another_runtime:
        monkeypatch.setattr(available, "is_installed", lambda runtime: runtime != "openvino")
    status, said = quantflow("predict", own_bundle, digits / "00.png")
    assert status == outcome.WRONG_INPUT, said
    assert message in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("text.png", "text.png cannot be decoded"),
        ("empty", "empty has no images"),
        ("deep.tiff", "deep.tiff cannot be decoded: its pixels are floating-point"),
        ("none.png", "'none.png' does not exist"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_clear_error_and_nothing_is_written(
    image, message, exported, quantflow, tmp_path
):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    Image.new("F", (8, 8)).save(tmp_path / "deep.tiff")
    status, said = quantflow("predict", exported, image, "--to", "out.parquet")
    assert status == outcome.WRONG_INPUT
    assert message in said
    assert not (tmp_path / "out.parquet").exists()


def test_what_no_run_wrote_is_named(exported, digits, quantflow, tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    for model, message in (
        ("weights.pt", "no quantflow document"),
        ("weights.pth", "is no model"),
        ("no.pt", "cannot be"),
    ):
        status, said = quantflow("predict", model, digits / "00.png")
        assert status == outcome.WRONG_INPUT
        assert message in said
