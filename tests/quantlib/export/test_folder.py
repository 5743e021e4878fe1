"""A bundle: what `quantflow export` writes, and its predict.py, which must answer as the report says."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import harness
import numpy as np
import pandas as pd
import pytest
import torch
import traces
from dashboard_driver import own_environment
from PIL import Image
from rows import file_info, model_info, preprocessing

from quantlib import api
from quantlib.data import image_folder, shards
from quantlib.data.feeding import feed
from quantlib.data.normalization import Normalization
from quantlib.data.transforms import EvalTransform
from quantlib.errors import ModelError
from quantlib.export import bundle, card, checksums, folder, openvino_ir, prediction
from quantlib.export.bundle import Preprocessing
from quantlib.recipe.interface import Interface

PREDICT = Path(folder.__file__).with_name("predict.py")


@pytest.fixture(scope="module")
def pictures(digits):
    """The files of `digits`."""
    return sorted(digits.iterdir())


def script_of(to):
    """A bundle's predict.py as a module."""
    spec = importlib.util.spec_from_file_location("predict", to / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_files(exported, to, keep):
    """A copy of a bundle whose document names only some of its files."""
    info = bundle.read(exported / "model.json")
    to.mkdir()
    for path in exported.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    (to / "SHA256SUMS").unlink()
    kept = [file for file in info.files if file.runtime.startswith(keep)]
    (to / "model.json").write_bytes(bundle.document(info.model_copy(update={"files": kept})))
    return to, kept[0]


def test_the_script_prints_the_five_likeliest_classes_as_the_table_predictions_has_them(
    undisturbed, exported, pictures
):
    command = [sys.executable, "-W", "ignore", str(exported / "predict.py"), *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own_environment(OMP_NUM_THREADS="1"))
    blocks = [done.stdout.splitlines()[start : start + 6] for start in range(0, 6 * len(pictures), 6)]
    assert [block[0] for block in blocks] == list(map(str, pictures))
    info = bundle.read(exported / "model.json")
    table = pd.read_parquet(undisturbed[0] / "reports" / "predictions")
    expected = table[table.variant == info.variant].top5
    assert [[int(line.split()[1]) for line in block[1:]] for block in blocks] == [list(top5) for top5 in expected]
    shares = np.array([[float(line.split()[0].rstrip("%")) for line in block[1:]] for block in blocks])
    assert (np.diff(shares) <= 0).all()
    assert (shares.sum(axis=1) <= 100.1).all()


@pytest.mark.parametrize("runtime", ["torchscript", "onnxruntime", "openvino"])
def test_each_file_of_a_bundle_gives_its_reported_top1_through_the_script(
    runtime, undisturbed, exported, pictures, tmp_path
):
    to, file = with_files(exported, tmp_path / "own", runtime)
    script = script_of(to)
    inputs = np.concatenate([script.prepare(path) for path in pictures])
    engine = torch.backends.quantized.engine
    try:
        answers = script.answer(inputs).argmax(axis=1)
    finally:
        torch.backends.quantized.engine = engine
    labels = pd.read_parquet(undisturbed[0] / "reports" / "predictions").query("variant == 'float'").label
    assert np.mean(answers == labels) == file.measured.accuracy.top1


def install(place, *packages):
    """A virtual environment with some packages, in this one's versions, and nothing else."""
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    if not Path(uv).exists():
        pytest.skip("needs uv to make virtual environments")
    named = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in packages]
    python = place / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, place], check=True)
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, *named], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs a registry that has {', '.join(named)}: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "torch"])
def test_with_one_runtime_and_nothing_of_quantflow_the_script_reproduces_the_reported_top1(
    package, undisturbed, exported, pictures, tmp_path
):
    python = install(tmp_path / "alone", package, "numpy", "pillow")
    alone = {name: value for name, value in own_environment(OMP_NUM_THREADS="1").items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, exported / "predict.py", *pictures],
        capture_output=True,
        text=True,
        check=True,
        env=alone,
        cwd=tmp_path,
    )
    shutil.rmtree(tmp_path / "alone")  # Gigabytes, with torch.
    answers = [int(line.split()[1]) for line in done.stdout.splitlines()[1::6]]
    files = pd.read_parquet(undisturbed[0] / "reports" / "files")
    (file,) = (each for each in bundle.read(exported / "model.json").files if each.runtime.startswith(package))
    reported = files[files.path.str.endswith(f"/{file.name}")].top1.item()
    labels = pd.read_parquet(undisturbed[0] / "reports" / "predictions").query("variant == 'float'").label
    assert np.mean(answers == labels) == file.measured.accuracy.top1 == reported


@pytest.fixture(scope="module")
def for_pixels(undisturbed, tmp_path_factory):
    """A run like the undisturbed one, whose files take pixels and give probabilities: its home and its outcome."""
    home = Path(shutil.copytree(undisturbed[0], tmp_path_factory.mktemp("pixels") / "home"))
    ends = {"input": "uint8", "layout": "nhwc", "softmax": True}
    outcome = harness.run(home, recipe={**harness.RECIPE, "export": ends})
    assert outcome.error == ""
    return home, outcome


def test_only_files_and_what_is_measured_on_them_are_made_again_for_pixels(for_pixels):
    computed = {label for label, reused in for_pixels[1].stages.items() if not reused}
    stages = ("script_and_save-", "try_file-", "save_onnx-", "evaluate", "benchmark", "choose_epoch-")
    assert computed
    assert [label for label in computed if not label.startswith((*stages, "pick_examples"))] == []


def test_files_for_pixels_are_as_accurate_as_those_for_normalized_images(undisturbed, for_pixels):
    (run,) = {path.name for path in (for_pixels[0] / "models").iterdir()} - {harness.run_id_of(undisturbed[0])}
    tables = (pd.read_parquet(for_pixels[0] / "reports" / name) for name in ("files", "variants"))
    for table in tables:
        before, after = (table[(table.run_id == run) == own] for own in (False, True))
        assert list(before.top1) == list(after.top1)
        assert list(before.variant) == list(after.variant)


@pytest.mark.parametrize("runtime", ["torchscript", "onnxruntime", "openvino"])
def test_a_bundle_for_pixels_says_so_and_answers_as_reported(runtime, undisturbed, for_pixels, pictures, tmp_path):
    (run,) = {path.name for path in (for_pixels[0] / "models").iterdir()} - {harness.run_id_of(undisturbed[0])}
    folder.export(for_pixels[0] / "models", run, "per_channel", tmp_path / "to")
    to, file = with_files(tmp_path / "to", tmp_path / "own", runtime)
    assert bundle.read(to / "model.json").schema_version == 2
    assert "uint8 `[N, 16, 16, 3]`" in (to / "README.md").read_text()
    script = script_of(to)
    inputs = np.concatenate([script.prepare(path) for path in pictures])
    assert inputs.dtype == np.uint8
    engine = torch.backends.quantized.engine
    try:
        answers = script.answer(inputs)
        predicted = list(prediction.Predictor(to).predict([str(path) for path in pictures]))
    finally:
        torch.backends.quantized.engine = engine
    np.testing.assert_allclose(answers.sum(axis=1), 1, rtol=1e-5)
    labels = pd.read_parquet(undisturbed[0] / "reports" / "predictions").query("variant == 'float'").label
    assert np.mean(answers.argmax(axis=1) == labels) == file.measured.accuracy.top1
    assert [int(each.classes[0]) for each in predicted] == list(answers.argmax(axis=1))
    np.testing.assert_allclose([each.probabilities[0] for each in predicted], answers.max(axis=1), rtol=1e-5)


@pytest.fixture(scope="module")
def with_ir(undisturbed, tmp_path_factory):
    """The bundle of the winner with OpenVINO IR, and with float's ONNX file."""
    pytest.importorskip("openvino", reason="needs openvino")
    to = tmp_path_factory.mktemp("bundles") / "ir"
    run_id = harness.run_id_of(undisturbed[0])
    folder.export(undisturbed[0] / "models", run_id, None, to, openvino_ir=True, with_float=True)
    return to


def test_ir_takes_the_place_of_the_onnx_file_for_openvino_and_float_comes_last(exported, with_ir):
    before, info = (bundle.read(to / "model.json") for to in (exported, with_ir))
    (onnx_file,) = (file for file in before.files if file.runtime == "openvino")
    (ir,) = (file for file in info.files if file.runtime == "openvino" and file.verdict != "baseline")
    assert ir == onnx_file.model_copy(update={"name": onnx_file.name.replace(".onnx", ".xml")})
    assert [file.name for file in info.files[:-1]] == [
        ir.name if file == onnx_file else file.name for file in before.files
    ]
    assert (info.files[-1].name, info.files[-1].verdict) == ("float.onnx", "baseline")
    assert bundle.read(with_ir / "float.onnx").files == [info.files[-1]]
    assert bundle.read(with_ir / ir.name) == info.model_copy(update={"files": [ir]})
    assert not (with_ir / onnx_file.name).exists()
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=with_ir, check=True, capture_output=True)
    # Once, though the ONNX file held it, too; and weights in float32.
    assert (with_ir / ir.name).read_text().count(info.run_id) == 1
    assert "FP16" not in (with_ir / ir.name).read_text()


def test_ir_gives_the_reported_top1_through_the_script_and_alone(undisturbed, with_ir, pictures, tmp_path):
    to, file = with_files(with_ir, tmp_path / "own", "openvino")
    script = script_of(to)
    answers = script.answer(np.concatenate([script.prepare(path) for path in pictures])).argmax(axis=1)
    labels = pd.read_parquet(undisturbed[0] / "reports" / "predictions").query("variant == 'float'").label
    assert np.mean(answers == labels) == file.measured.accuracy.top1
    predicted = prediction.Predictor(with_ir / file.name).predict([str(path) for path in pictures])
    assert [int(each.classes[0]) for each in predicted] == list(answers)
    model = api.load(with_ir / file.name)
    assert len(model(torch.zeros(1, 3, 16, 16))) == 1


def test_ir_with_damaged_weights_is_refused(with_ir, tmp_path):
    to = Path(shutil.copytree(with_ir, tmp_path / "own"))
    (weights,) = to.glob("*.bin")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"\.bin is damaged"):
        prediction.Predictor(weights.with_suffix(".xml"))
    (to / "SHA256SUMS").unlink()
    weights.with_suffix(".xml").write_text("<net")
    with pytest.raises(ModelError, match=r"\.xml is damaged, or no OpenVINO IR"):
        bundle.read(weights.with_suffix(".xml"))


def test_ir_that_answers_differently_is_not_written(undisturbed, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="needs openvino")
    opened = iter([lambda x: x.flatten(1), lambda x: -x.flatten(1)])
    monkeypatch.setattr(openvino_ir.classifiers, "open_model", lambda *_: next(opened))
    with pytest.raises(ModelError, match=r"answers differently by 400\.00% of its power.*without --openvino-ir"):
        folder.export(
            undisturbed[0] / "models", harness.run_id_of(undisturbed[0]), None, tmp_path / "to", openvino_ir=True
        )
    assert list(tmp_path.iterdir()) == []


IMAGES = {
    "wide.jpg": lambda rng: Image.fromarray(rng.integers(0, 256, (41, 67, 3), np.uint8)),
    "tall.png": lambda rng: Image.fromarray(rng.integers(0, 256, (90, 31, 3), np.uint8)),
    "long.png": lambda rng: Image.fromarray(rng.integers(0, 256, (20, 401, 3), np.uint8)),
    "grey.png": lambda rng: Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)),
    "deep.png": lambda rng: Image.fromarray(rng.integers(0, 2**16, (40, 40), np.uint16)),
    "clear.png": lambda rng: Image.fromarray(rng.integers(0, 256, (40, 50, 4), np.uint8)),
    "few.gif": lambda rng: Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).convert("P"),
}
TRANSFORMS = [
    EvalTransform(resize=36, crop=(32, 32)),
    EvalTransform(resize=33, crop=(32, 20), interpolation="bicubic"),
    EvalTransform(resize=(30, 50), crop=(29, 32), interpolation="lanczos"),
    EvalTransform(resize=24, crop=(24, 24), interpolation="nearest", normalization=Normalization((0.3,), (0.4,))),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_the_script_prepares_an_image_bit_by_bit_as_evaluation_does(name, transform, tmp_path):
    image = IMAGES[name](np.random.default_rng(3))
    exif = image.getexif()
    exif[0x0112] = 6  # Lying on its side.
    image.save(tmp_path / name, **({"exif": exif} if name == "wide.jpg" else {}))
    prepared = Preprocessing.of(transform)
    info = model_info(preprocessing=prepared, input_size=prepared.input_size)
    (tmp_path / "model.json").write_bytes(bundle.document(info))
    (tmp_path / "predict.py").write_bytes(PREDICT.read_bytes())
    pixels = image_folder.split_of_files([(str(tmp_path / name), 0)], ("a",)).pixels(0, transform, None)
    expected = shards.to_input(torch.from_numpy(pixels.copy())[None], transform.normalization).numpy()
    assert np.array_equal(script_of(tmp_path).prepare(tmp_path / name), expected)
    for layout in ("nchw", "nhwc"):
        own = Interface(input="uint8", layout=layout)
        (tmp_path / "model.json").write_bytes(bundle.document(info.model_copy(update={"interface": own})))
        expected = feed(torch.from_numpy(pixels.copy())[None], transform.normalization, own).numpy()
        assert np.array_equal(script_of(tmp_path).prepare(tmp_path / name), expected)


def test_the_script_is_short_and_needs_no_package_but_numpy_and_pillow():
    assert len(PREDICT.read_text().splitlines()) <= 60
    nodes = list(ast.walk(ast.parse(PREDICT.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "PIL"}


@pytest.mark.skipif(traces.MISSING is not None, reason=str(traces.MISSING))
def test_the_script_reaches_nothing_outside_this_machine(exported, pictures, tmp_path):
    seen = traces.trace(
        [sys.executable, str(exported / "predict.py"), str(pictures[0])], tmp_path / "trace", cwd=tmp_path
    )
    assert seen.returncode == 0, seen.said
    assert seen.foreign() == []


@pytest.mark.parametrize("image", ["none.png", "text.png"])
def test_the_script_names_an_image_that_it_cannot_read_in_one_line(image, exported, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    command = [sys.executable, str(exported / "predict.py"), str(tmp_path / image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert image in done.stderr
    assert "File " not in done.stderr


def test_without_a_runtime_the_script_names_those_that_would_do(exported):
    code = f"""
import importlib.util, numpy, runpy
importlib.util.find_spec = lambda _: None
runpy.run_path({str(exported / "predict.py")!r})["answer"](numpy.zeros(1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Install the runtime of one of the files: ")
    assert "openvino" in done.stderr


def test_a_bundle_holds_all_accepted_files_the_best_first_and_says_what_they_are(undisturbed, exported):
    home, _ = undisturbed
    variants = pd.read_parquet(home / "reports" / "variants").set_index("variant")
    files = pd.read_parquet(home / "reports" / "files")
    (winner,) = variants.index[variants.winner]
    info = bundle.read(exported / "model.json")
    expected = files[(files.variant == winner) & (files.gate == "inside")]
    assert {file.name for file in info.files} == {Path(path).name for path in expected.path}
    assert info.files[0].name == Path(variants.artifact_path[winner]).name
    assert {path.name for path in exported.iterdir()} == {file.name for file in info.files} | {
        "model.json",
        "predict.py",
        "README.md",
        "SHA256SUMS",
    }
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=exported, check=True, capture_output=True)
    for file in info.files:
        assert bundle.read(exported / file.name) == info.model_copy(update={"files": [file]})


def test_the_card_says_how_good_it_is_on_what_and_how_to_run_it(exported):
    text, info = (exported / "README.md").read_text(), bundle.read(exported / "model.json")
    for file in info.files:
        measured = file.measured
        accuracy = f"{measured.accuracy.num_images} | {measured.accuracy.top1:.2%}"
        assert f"`{file.name}` | {file.runtime} {file.runtime_version} | {accuracy}" in text
        assert f"{measured.accuracy.top1_low:.2%} to {measured.accuracy.top1_high:.2%}" in text
    for words in (
        "10 classes apart: 0, 1, 2",
        "60 validation images of scikit-learn's handwritten digits, which are no image files: save one as a PNG",
        "python digits/predict.py image.jpg",
        info.cpu_model,
        info.run_id,
    ):
        assert words in text


def test_the_card_of_what_the_gate_refused_says_so():
    refused = model_info(
        file_info(verdict="outside"),
        file_info(name="b.pt", verdict="unavailable", runtime="torchscript-x86", measured=None),
    )
    assert "**Not accepted by its run's gate: outside.**" in card.write(refused, "x")
    assert "| `b.pt` | torchscript-x86 1.32.0 | not measured |" in card.write(refused, "x")
    assert "Not accepted" not in card.write(model_info(), "x")
    assert "the image folder `flowers`" in card.write(model_info(), "x")
    optimistic = model_info(recipe={"evaluation": {"select_on": "validation"}, "data": {"format": "own.data:read"}})
    assert "optimistic" in card.write(optimistic, "x")
    assert "the dataset `own.data:read`" in card.write(optimistic, "x")


@pytest.fixture
def models(tmp_path):
    """The files of a run, which hold nothing but their documents: "a" was accepted in one runtime, "b" in none."""
    place = tmp_path / "models" / "first"
    place.mkdir(parents=True)
    digests = {}
    for variant, name, verdict in (
        ("a", "a.onnx", "accepted"),
        ("a", "a.2.onnx", "slower"),
        ("b", "b.onnx", "outside"),
    ):
        info = model_info(file_info(name=name, verdict=verdict), variant=variant)
        (place / name).write_bytes(bundle.attach(b"", "onnx", info))
        digests[name] = hashlib.sha256((place / name).read_bytes()).hexdigest()
    checksums.write(place, digests)
    return tmp_path / "models"


@pytest.mark.parametrize(("variant", "names"), [("a", {"a.onnx"}), ("b", {"b.onnx"})])
def test_a_named_variant_is_exported_with_what_was_accepted_or_else_with_all(variant, names, models, tmp_path):
    info = folder.export(models, "first", variant, tmp_path / "deep" / "to")
    assert {file.name for file in info.files} == names
    assert names <= {path.name for path in (tmp_path / "deep" / "to").iterdir()}


@pytest.mark.parametrize(
    ("run_id", "variant", "message"),
    [
        ("fist", None, r"No files of a run 'fist' in .* \(did you mean 'first'\?\)\. The newest are: first\."),
        ("first", None, "Run first has no winner: choose one of its variants, --variant a or b"),
        ("first", "c", "Run first has no variant 'c'.*It has a, b"),
    ],
)
def test_what_is_not_there_is_an_error_that_names_what_is(run_id, variant, message, models, tmp_path):
    with pytest.raises(ModelError, match=message):
        folder.export(models, run_id, variant, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(("wish", "option"), [("openvino_ir", "--openvino-ir"), ("with_float", "--float")])
def test_a_file_that_the_run_does_not_have_is_named_with_the_option_to_leave_out(wish, option, models, tmp_path):
    with pytest.raises(ModelError, match=f"has no .*: leave out {option}"):
        folder.export(models, "first", "a", tmp_path / "to", **{wish: True})
    assert not (tmp_path / "to").exists()


def test_a_folder_with_anything_in_it_is_refused_and_an_empty_one_is_not(models, tmp_path):
    (tmp_path / "to").mkdir()
    folder.export(models, "first", "a", tmp_path / "to")
    before = sorted(path.name for path in (tmp_path / "to").iterdir())
    for place in (tmp_path / "to", tmp_path / "to" / "README.md"):
        with pytest.raises(ModelError, match="exists and is not an empty folder"):
            folder.export(models, "first", "a", place)
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == before


def test_a_bundle_that_cannot_be_completed_leaves_nothing(models, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(checksums, "write", fail)
    (tmp_path / "place").mkdir()
    with pytest.raises(OSError, match="no room"):
        folder.export(models, "first", "a", tmp_path / "place" / "to")
    assert list((tmp_path / "place").iterdir()) == []


def test_a_damaged_file_is_not_exported(models, tmp_path):
    path = models / "first" / "a.onnx"
    path.write_bytes(path.read_bytes().replace(b"tiny", b"Tiny"))
    with pytest.raises(ModelError, match="a.onnx is damaged"):
        folder.export(models, "first", "a", tmp_path / "to")


def test_the_documents_preprocessing_is_json_that_any_language_reads(exported):
    read = json.loads((exported / "model.json").read_text())
    assert read["preprocessing"] == vars(replace(preprocessing(), resize=[16], crop=[16, 16]))
