"""The command line: exit statuses and messages."""

import errno
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import exported
import finished_runs
import pytest
from click.testing import CliRunner
from PIL import Image
from torch import nn

from flows import parameters
from flows.cli import commands, outcome
from quantlib.report.rows import NoteRow


@pytest.fixture
def quantflow(tmp_path, monkeypatch):
    """Runs a command line in an empty folder; returns (exit status, output)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # Wide enough that no table breaks a word.
    for name in ("QUANTFLOW_HOME", "PREFECT_API_URL", "PREFECT_HOME", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def call(*arguments):
        result = CliRunner().invoke(commands.main, [*arguments])
        return result.exit_code, result.output

    return call


@pytest.fixture
def folder(tmp_path):
    """An image folder of two classes."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 40), (number * 20, 0, 0)).save(place / f"{number}.png")
    return tmp_path / "data"


RECIPE = """
name = "own"
[model]
weights = "train"
[data]
format = "imagefolder"
root = "data"
resize = 32
crop = 32
[evaluation]
num_held_out = 2
[calibration]
batch_size = 2
num_batches = 1
[[ptq]]
name = "per_channel"
"""


@pytest.fixture
def recipe(tmp_path, folder):
    path = tmp_path / "own.toml"
    path.write_text(RECIPE)
    return path


WRONG_SETTINGS = [
    ("ptq.0.qconfg=default", "Unknown key 'ptq.0.qconfg' (did you mean 'qconfig'?)"),
    ("ptq.0.qconfig=fbgem", "(did you mean 'fbgemm'?). Allowed: accurate, default, fbgemm, x86, onednn, qnnpack"),
    ("data.root=nowhere", "data.root must hold train/CLASS/IMAGE"),
    (
        "data.format=imagfolder",
        "data.format = 'imagfolder' is unknown. Allowed: digits, imagefolder, classfolders, imagenet, cifar10",
    ),
    ("model.weights=none.pth", "No weights file"),
    ("model.architecture=mobilnet", "model.architecture = 'mobilnet' is unknown"),
    ("model.arguments.num_classes=7", "num_classes = 7, and the data has 2 classes"),
    ("calibration.num_batches=100", "calibration asks for 100 batches of 2 = 200 images"),
    ("evaluation.num_held_out=5", "at most half may be held out"),
    ("engine=qnnpak", "(did you mean 'qnnpack'?)"),
    ("gate.max_top1_drop=2", "gate.max_top1_drop = 2 is not allowed"),
    ("data", "has no value: write KEY=VALUE"),
]


@pytest.mark.parametrize(("setting", "message"), WRONG_SETTINGS)
def test_a_wrong_setting_is_named_with_what_is_allowed_and_nothing_is_run(
    setting, message, recipe, quantflow, tmp_path
):
    status, said = quantflow("run", str(recipe), "--set", setting)
    assert status == outcome.WRONG_INPUT
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / ".quantflow" / "store").exists()
    assert not (tmp_path / ".quantflow" / "runs").exists()


def remove_classes(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


def rename_class(folder):
    (folder / "val" / "dog").rename(folder / "val" / "cow")


def remove_images(folder):
    for path in (folder / "val").rglob("*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_classes, "has no classes"),
        (rename_class, "they differ in cow, dog"),
        (remove_images, "has a class without images"),
    ],
)
def test_a_spoilt_dataset_is_named_before_any_stage_starts(spoil, message, folder, recipe, quantflow, tmp_path):
    spoil(folder)
    status, said = quantflow("run", str(recipe))
    assert status == outcome.WRONG_INPUT
    assert message in said
    assert not (tmp_path / ".quantflow" / "store").exists()


def test_an_engine_that_this_cpu_lacks_is_an_error_that_names_those_it_has(recipe, quantflow, monkeypatch):
    import torch

    supported = property(lambda _: ["none", "x86"])
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", supported)
    status, said = quantflow("run", str(recipe), "--set", "engine=qnnpack")
    assert status == outcome.WRONG_INPUT
    assert "this machine's torch has x86" in said


def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones(quantflow):
    status, said = quantflow("run", "digit")
    assert status == outcome.WRONG_INPUT
    assert "did you mean 'digits'?" in said


def test_a_file_that_is_not_toml_is_named(quantflow, tmp_path):
    (tmp_path / "broken.toml").write_text("name = ")
    status, said = quantflow("run", "broken.toml")
    assert status == outcome.WRONG_INPUT
    assert "cannot be read as TOML" in said


def test_every_recipe_is_listed(quantflow):
    status, said = quantflow("recipes")
    assert status == 0
    for name in parameters.packaged_recipes():
        assert name in said


def test_a_pipe_that_its_reader_closed_is_not_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flows.cli.commands", "recipes"]
    for environment in (os.environ, os.environ | {"PYTHONUNBUFFERED": "1"}):  # Fails at the end, or immediately.
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=environment)
        assert done.stderr == ""
    os.close(writer)


def test_version(quantflow):
    assert quantflow("--version")[1].startswith("quantflow, version ")


@pytest.mark.parametrize("command", [["report"], ["runs"]])
def test_an_empty_home_is_not_an_error(command, quantflow):
    status, said = quantflow(*command)
    assert status == 0
    assert "quantflow run" in said


def test_nothing_to_resume_is_reported(quantflow):
    status, said = quantflow("resume")
    assert status == outcome.WRONG_INPUT
    assert "Nothing to resume" in said


def test_report_and_runs_and_cache_show_a_finished_run(home_copy, quantflow):
    for command, words in [
        (["report"], ["per_channel", "winner", "baseline"]),
        (["runs"], ["completed", "pick_examples"]),
        (["cache", "list"], ["qat_epoch", "calibrate"]),
        (["cache", "verify"], ["artifacts were read, and 0 are damaged."]),
    ]:
        status, said = quantflow(*command, "--home", str(home_copy))
        assert status == 0, said
        for word in words:
            assert word in said


def test_freeing_without_saying_what_is_refused(home_copy, quantflow):
    status, said = quantflow("cache", "free", "--home", str(home_copy))
    assert status == outcome.WRONG_INPUT
    assert "--keep-runs" in said


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "The disk is full"),
        (errno.EROFS, "is read-only: choose another with --home"),
        (errno.EACCES, "change its permissions"),
        (errno.ENAMETOOLONG, "A name is too long"),
        (errno.EISDIR, "A folder is where a file is needed"),
    ],
)
def test_an_error_of_the_operating_system_is_not_reported_as_a_bug(number, says, monkeypatch, tmp_path):
    def refuse(_):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("quantlib.store.journal.read_runs", refuse)
    found = CliRunner().invoke(commands.main, ["runs", "--home", str(tmp_path)])
    assert found.exit_code == 2
    assert says in found.stderr
    assert "/some/file" in found.stderr
    assert "bug in quantflow" not in found.stderr


def test_a_read_only_home_is_reported(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        found = CliRunner().invoke(commands.main, ["run", "--home", str(tmp_path / "home")])
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert found.exit_code == 2
    assert f"is read-only: choose another with --home: {tmp_path}/home" in found.stderr


def test_a_name_that_is_too_long_and_a_lock_that_is_a_folder_are_reported(tmp_path):
    found = CliRunner().invoke(commands.main, ["run", "--home", str(tmp_path / ("x" * 300))])
    assert found.exit_code == 2
    assert "A name is too long" in found.stderr
    (tmp_path / "prefect" / "server.lock").mkdir(parents=True)
    found = CliRunner().invoke(commands.main, ["run", "--home", str(tmp_path)])
    assert found.exit_code == 2
    assert "server.lock is a folder, where a regular file belongs" in found.stderr


def test_inspect_shows_what_becomes_int8_and_why_the_rest_does_not_and_runs_nothing(recipe, quantflow, tmp_path):
    status, said = quantflow(
        "inspect",
        str(recipe),
        "--set",
        "model.architecture=torchvision:mobilenet_v3_small",
        "--set",
        "model.arguments={}",
    )
    assert status == 0
    assert re.search(r"features\.0\.0 +Conv2d +int8", said)
    assert re.search(r"features\.1\.block\.1\.fc1 +Conv2d +float +0\.\d% +it computes a gate", said)
    assert re.search(r"\d\d\.\d% of the multiply-adds are int8", said)
    assert not (tmp_path / ".quantflow" / "store").exists()


def test_inspect_reads_an_exported_model(recipe, quantflow, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(512, 2))
    exported.write(net, tmp_path / "net.pt2")
    recipe.write_text(recipe.read_text().replace('weights = "train"', 'architecture = "file:net.pt2"'))

    status, said = quantflow("inspect", str(recipe), "--set", "ptq.0.float_layers=['3']")

    assert status == 0
    assert re.search(r"0 +Conv2d +int8", said)
    assert re.search(r"3 +Linear +int8", said)
    status, said = quantflow("inspect", str(recipe), "--set", "data.crop=16")
    assert status == outcome.WRONG_INPUT
    assert "it was exported for images of [3 x 32 x 32]" in said


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("torchvision:resnet81", "torchvision has no classifier 'resnet81'"),
        ("torch.nn:Identity", "The model gives [1, 3, 32, 32] for one image, and the data has 2 classes"),
    ],
)
def test_inspect_refuses_what_run_would_refuse(architecture, message, recipe, quantflow):
    status, said = quantflow(
        "inspect", str(recipe), "--set", f"model.architecture={architecture}", "--set", "model.arguments={}"
    )
    assert status == outcome.WRONG_INPUT
    assert message in said


def test_init_writes_a_recipe_that_can_be_inspected_and_prints_its_path_alone(folder, quantflow, tmp_path):
    status, said = quantflow("init", "data", "--to", "pets.toml")
    assert (status, said) == (0, "pets.toml\n")
    status, said = quantflow("inspect", "pets.toml")
    assert status == 0, said
    assert "100.0% of the multiply-adds are int8" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".quantflow", "data", "pets.toml"]


def test_init_reports_what_is_missing_and_never_overwrites(folder, quantflow, tmp_path):
    for arguments, message in [
        (["nowhere"], "No folder nowhere"),
        (["data", "--weights", "none.pth"], "No weights file 'none.pth'"),
    ]:
        status, said = quantflow("init", *arguments)
        assert status == outcome.WRONG_INPUT
        assert message in said
    (tmp_path / "recipe.toml").write_text("mine")
    status, said = quantflow("init", "data")
    assert status == outcome.WRONG_INPUT
    assert "recipe.toml exists" in said


@pytest.mark.parametrize(
    ("row", "notes", "status"),
    [
        ({}, (), 0),
        ({}, (NoteRow(kind="regression", text="small is slower."),), outcome.REGRESSION),
        ({"winner": False}, (), outcome.NO_WINNER),
        ({"winner": False}, (NoteRow(kind="regression", text="none."),), outcome.NO_WINNER),
    ],
)
def test_the_exit_status_says_how_the_run_went(row, notes, status, recipe, quantflow, monkeypatch):
    found = replace(finished_runs.report(finished_runs.FIRST, **row), notes=notes)
    monkeypatch.setattr("flows.cli.running.run_here", lambda *_, **__: found)
    ended, said = quantflow("run", str(recipe))
    assert ended == status
    assert ("Regression: " in said) == bool(notes)
