"""Runtimes that only a recipe's own wish brings in: their files are made, judged, shipped and run as all others."""

import subprocess
import sys

import harness
import numpy as np
import pandas as pd
import pytest
from dashboard_driver import own_environment

from quantlib.export import bundle, folder, prediction
from quantlib.report import tables
from quantlib.runtimes import available

RUNTIMES = [name for name in ("torch_export", "executorch") if available.is_installed(name)]
RECIPE = harness.RECIPE | {"qat": [], "benchmark": {"num_samples": 10, "runtimes": RUNTIMES}}


@pytest.fixture(scope="module")
def home(prefect_server, tmp_path_factory):
    """The home of a run for these runtimes."""
    place = tmp_path_factory.mktemp("named") / "home"
    outcome = harness.run(place, recipe=RECIPE)
    assert outcome.error == ""
    return place


@pytest.fixture(scope="module")
def shipped(home, tmp_path_factory):
    """The bundle of the quantized variant."""
    to = tmp_path_factory.mktemp("bundles") / "digits"
    return to, folder.export(home / "models", harness.run_id_of(home), "per_channel", to)


def test_float_and_int8_are_written_timed_and_judged(home):
    models = {path.name for path in (home / "models" / harness.run_id_of(home)).iterdir()}
    endings = [available.suffix_of(runtime) for runtime in RUNTIMES]
    assert models - {"SHA256SUMS"} == {f"{name}{ending}" for name in ("float", "per_channel") for ending in endings}
    latency = pd.read_parquet(home / "reports" / "latency")
    for variant in ("float", "per_channel"):
        assert set(latency[latency.variant == variant].runtime) == {*RUNTIMES}
    judged = pd.read_parquet(home / "reports" / "files").set_index("runtime")
    assert set(RUNTIMES) <= set(judged.index)
    assert (judged.gate == "inside").all()
    ((_, row),) = (each for each in tables.read_variants(home / "reports") if each[1].variant == "per_channel")
    assert (row.onnx_path, row.onnx_refusal, row.other_refusal) == (None, None, None)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_bundle_holds_its_file_and_its_script_runs_it(runtime, home, shipped, digits, tmp_path):
    to, info = shipped
    (file,) = (each for each in info.files if each.runtime == runtime)
    assert bundle.read(to / file.name).files == [file]
    own = tmp_path / "own"
    own.mkdir()
    for path in to.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    (own / "SHA256SUMS").unlink()
    (own / "model.json").write_bytes(bundle.document(info.model_copy(update={"files": [file]})))
    images = sorted(map(str, digits.iterdir()))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(own / "predict.py"), *images],
        capture_output=True,
        text=True,
        check=True,
        env=own_environment(OMP_NUM_THREADS="1"),
    )
    lines = done.stdout.splitlines()
    printed = [[int(line.split()[1]) for line in lines[start + 1 : start + 6]] for start in range(0, len(lines), 6)]
    predicted = [[int(name) for name in each.classes] for each in prediction.Predictor(own).predict(images)]
    assert printed == predicted
    labels = pd.read_parquet(home / "reports" / "predictions").query("variant == 'float'").label
    assert np.mean([top5[0] for top5 in printed] == labels) == file.measured.accuracy.top1
