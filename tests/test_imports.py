"""What is imported, and when: each of these libraries takes from a tenth of a second to a few seconds."""

import subprocess
import sys

import pytest

_READ_IMAGES = """
import random, sys
from quantlib.data import datasets
from quantlib.data.transforms import EvalTransform, TrainTransform
split = datasets.open_split("imagefolder", sys.argv[1], "train")
for transform in (EvalTransform(resize=32, crop=(32, 32)), TrainTransform(crop=(32, 32), scale=(0.5, 1.0), flip=0.5)):
    split.pixels(0, transform, random.Random(0))
"""
_OPEN_STORE = """
import os, sys
from pathlib import Path
from quantlib.store.opening import open_store
os.environ["QUANTFLOW_STORE"] = ""
open_store(Path(sys.argv[1]))
"""
_OPEN_SHARED_FOLDER = _OPEN_STORE.replace('""', "sys.argv[1]")
_TRAIN = """
import sys
import numpy as np
from torch import nn
from quantlib.data import datasets
from quantlib.quantize import qat
from quantlib.recipe.schedule import Schedule
from quantlib.data.transforms import EvalTransform
split = datasets.open_split("imagefolder", sys.argv[1], "train")
schedule = Schedule(1, 6, None, 0.1, "constant", 0, 0, seed=0)
model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
qat.train_epoch(model, 0, schedule, split, np.arange(6), EvalTransform(resize=8, crop=(8, 8)))
"""


@pytest.mark.parametrize(
    ("source", "unwanted"),
    [
        pytest.param("import flows.cli.commands", "pydantic pyarrow prefect torch distributed dask", id="help"),
        pytest.param(
            "import flows.parameters, flows.cli.console, flows.cli.running",
            "pyarrow prefect torch",
            id="before the server starts",
        ),
        pytest.param("import quantlib.inputs", "pyarrow prefect torch", id="finding inputs"),
        pytest.param(_READ_IMAGES, "torch torchvision", id="reading images"),
        # Importing torchvision, or using torch.optim's optimizers, also imports torch's compiler.
        pytest.param(
            "import flows.quantize, quantlib.api", "torchvision torch._dynamo distributed dask", id="before the stages"
        ),
        pytest.param(_TRAIN, "torchvision torch._dynamo", id="training"),
        pytest.param(_OPEN_STORE, "obstore quantlib.store.shared quantlib.store.leases", id="a store of one's own"),
        pytest.param(_OPEN_SHARED_FOLDER, "obstore quantlib.store.bucket", id="a shared folder"),
        pytest.param("import flows.quantize", "obstore quantlib.store.shared", id="a flow"),
    ],
)
def test_nothing_is_imported_that_is_not_needed(source, unwanted, image_folder):
    check = f"\nimport sys\nprint(*{set(unwanted.split())} & sys.modules.keys())"
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source + check, str(image_folder)],
        check=True,
        capture_output=True,
        text=True,
    )

    assert ended.stdout.split() == []
