"""A tiny net and tiny images, so that a test costs a fraction of a second."""

import copy
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import harness
import numpy as np
import object_server
import pandas as pd
import pytest
import torch
from PIL import Image
from schemes import scheme
from torch import nn

from quantlib.data import datasets, loading, shards
from quantlib.data.normalization import IMAGENET
from quantlib.data.transforms import EvalTransform, TrainTransform
from quantlib.export import folder
from quantlib.graph import fusion
from quantlib.graph.model import trace_model
from quantlib.measure import significance
from quantlib.models import mobilenet_v2, training
from quantlib.models.checkpoint import Header
from quantlib.quantize import calibration, preparation
from quantlib.recipe.sections import TrainingRecipe
from quantlib.runtimes.available import resolve_engine
from quantlib.store.local import Store
from quantlib.store.opening import open_store
from quantlib.store.retention import find_damage

# A server that Prefect itself starts for a test sends nothing out; quantflow's own set this themselves.
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
# Tests share a store only where they say so.
os.environ.pop("QUANTFLOW_STORE", None)

CLASSES = ("blue", "green", "red")
CROP = 32
TINY_ARGUMENTS = {
    "num_classes": len(CLASSES),
    "width_mult": 0.25,
    # The first and the last row have a block whose input is added to its output.
    "inverted_residual_setting": [[1, 32, 1, 1], [2, 48, 1, 2], [4, 64, 2, 2]],
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """A tiny net gains nothing from more threads, and on a busy machine they wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def ctrl_c_works():
    """Make SIGINT work as in a terminal, also in child processes: in a script's background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """One Prefect server for all tests that need one."""
    with harness.serve_prefect(tmp_path_factory.mktemp("prefect")):
        yield


@pytest.fixture(scope="session")
def undisturbed(prefect_server, tmp_path_factory):
    """An undisturbed run: its home and its outcome. Copy the home before changing it."""
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    outcome = harness.run(home)
    assert outcome.error == ""
    assert outcome.exitcode == 0
    return home, outcome


@pytest.fixture(scope="session")
def exported(undisturbed, tmp_path_factory):
    """The bundle of the winner of a run on digits; read-only."""
    home, _ = undisturbed
    to = tmp_path_factory.mktemp("bundles") / "digits"
    folder.export(home / "models", harness.run_id_of(home), None, to)
    return to


@pytest.fixture(scope="session")
def digits(undisturbed, tmp_path_factory):
    """A folder with the validation images of the run, in the order of the table `predictions`."""
    names = pd.read_parquet(undisturbed[0] / "reports" / "predictions").query("variant == 'float'").image
    split = datasets.open_split("digits", None, "val")
    numbers = {split.name_of(index): index for index in range(len(split))}
    place = tmp_path_factory.mktemp("digits")
    for number, name in enumerate(names):
        split.open(numbers[name]).save(place / f"{number:02}.png")
    return place


@pytest.fixture
def home_copy(undisturbed, tmp_path):
    """A copy of a finished run's home, free to change."""
    return Path(shutil.copytree(undisturbed[0], tmp_path / "home"))


@pytest.fixture(scope="session")
def shared(request):
    """Finds real data and weights, kept next to the repository; skips the test if they are missing."""

    def find(name):
        path = request.config.rootpath.parent / "shared" / name
        if not path.exists():
            pytest.skip(f"needs ../shared/{name}")
        return path

    return find


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def s3():
    """moto's S3, with one bucket for all tests."""
    with object_server.serving() as server:
        yield server


@pytest.fixture
def proxy(s3):
    """A proxy in front of moto's S3."""
    made = object_server.Proxy(s3.port)
    yield made
    made.close()


@pytest.fixture
def open_bucket(monkeypatch):
    """Opens objects of a server, below a prefix of this test's own."""
    from quantlib.store.bucket import BucketObjects

    prefix = os.urandom(8).hex()

    def open_objects(server):
        for name, value in object_server.environment(server, prefix).items():
            monkeypatch.setenv(name, value)
        return BucketObjects(os.environ["QUANTFLOW_STORE"])

    return open_objects


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """The artifacts of every record in a shared store by key, as a machine with an empty home reads them."""

    def read(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = open_store(tmp_path / "a reader")
        assert find_damage(store)[1] == []
        return {record.key: record.outputs for record in store.records() if record.stage != "benchmark"}

    return read


@pytest.fixture
def small_disk(tmp_path, request):
    """A folder on a disk of 600 kB, or of the size that the test asks for."""
    place = tmp_path / "disk"
    place.mkdir()
    size = getattr(request, "param", "600k")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/CLASS/IMAGE and val/CLASS/IMAGE: noise of three colours, 12 and 6 images per class, of all shapes.

    Read-only: tests that change files take `own_folder`.
    """
    root = tmp_path_factory.mktemp("image_folder")
    rng = np.random.default_rng(0)
    for split, num_images in (("train", 12), ("val", 6)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(num_images):
                height, width = rng.integers(34, 60, 2)
                pixels = rng.integers(0, 150, (height, width, 3))
                pixels[..., 2 - label] += 100
                # Both usual formats; names sort by their number.
                suffix = "png" if number % 2 else "jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.{suffix}")
    return root


@pytest.fixture
def own_folder(image_folder, tmp_path):
    """A copy of `image_folder` that a test may change."""
    import shutil

    return Path(shutil.copytree(image_folder, tmp_path / "own_folder"))


@pytest.fixture(scope="session")
def train_split(image_folder):
    return datasets.open_split("imagefolder", str(image_folder), "train")


@pytest.fixture(scope="session")
def val_split(image_folder):
    return datasets.open_split("imagefolder", str(image_folder), "val")


def _decoded(split, path):
    order = np.random.default_rng(1).permutation(len(split))
    with path.open("wb") as file:
        shards.save(
            loading.decode(split, order, EvalTransform(resize=CROP, crop=(CROP, CROP)), seed=0),
            split.labels[order],
            IMAGENET,
            file,
        )
    return path


@pytest.fixture(scope="session")
def train_shard(train_split, tmp_path_factory):
    """36 decoded images, classes mixed."""
    return _decoded(train_split, tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="session")
def val_shard(val_split, tmp_path_factory):
    """18 decoded images, classes mixed."""
    return _decoded(val_split, tmp_path_factory.mktemp("shards") / "val")


@pytest.fixture(scope="session")
def val_inputs(val_shard):
    """The 18 images of `val_shard` as a model's input."""
    return shards.open_shard(val_shard).inputs()


@pytest.fixture(scope="session")
def tiny_arguments():
    return dict(TINY_ARGUMENTS)


@pytest.fixture(scope="session")
def stir_batch_norm():
    """Gives every BatchNorm statistics and weights that are not the initial 0 and 1, in place."""

    def stir(model):
        generator = torch.Generator().manual_seed(5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                with torch.no_grad():
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
        return model

    return stir


@pytest.fixture
def tiny_model(stir_batch_norm):
    """A MobileNetV2 of four blocks, two of them residual, untrained, in eval mode."""
    torch.manual_seed(0)
    return stir_batch_norm(mobilenet_v2.mobilenet_v2(**TINY_ARGUMENTS)).eval()


@pytest.fixture(scope="session")
def tiny_header():
    """The header `checkpoint.save` gets for `tiny_model` and `trained_model`."""
    return Header(architecture="mobilenet_v2", arguments=TINY_ARGUMENTS, code="", input_shape=(3, CROP, CROP))


@pytest.fixture(scope="session")
def trained_model(train_split):
    """The tiny net, trained to tell the three colours apart; read-only."""
    torch.manual_seed(0)
    model = mobilenet_v2.mobilenet_v2(**TINY_ARGUMENTS)
    recipe = TrainingRecipe(epochs=20, batch_size=12, learning_rate=0.01)
    training.train(
        model,
        train_split,
        np.arange(len(train_split)),
        TrainTransform(crop=(CROP, CROP), scale=(0.5, 1.0), flip=0.5),
        recipe,
        0,
    )
    return model


@pytest.fixture(scope="session")
def traced_model(trained_model):
    """The trained net as a graph; read-only."""
    return trace_model(copy.deepcopy(trained_model), (3, CROP, CROP))


@pytest.fixture(scope="session")
def fused_model(traced_model):
    """Fused in mode "eval"; read-only."""
    return fusion.fuse_model(traced_model, "eval")


@pytest.fixture(scope="session")
def calibrated(fused_model, train_shard):
    """The trained net, calibrated once per qconfig name; read-only."""
    known: dict[str, nn.Module] = {}

    def calibrate(qconfig):
        if qconfig not in known:
            known[qconfig] = preparation.observe(fused_model, ())
            calibration.calibrate(known[qconfig], train_shard, batch_size=12)
            calibration.choose_ranges(known[qconfig], scheme(qconfig))
        return known[qconfig]

    return calibrate


@pytest.fixture(scope="session")
def engine():
    """The int8 engine that torch prefers on this machine."""
    return resolve_engine("auto")


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.fixture
def equally_fast(monkeypatch):
    """Treat all files as equally fast, as the harness's runs do, so that a plan matches what those runs did."""
    monkeypatch.setattr(significance, "is_slower", lambda *_: False)
