"""The whole flow, once, on the small recipe of the harness."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import duckdb
import exported
import harness
import httpx
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch
from torch import nn
from torchvision import transforms

from quantlib import api
from quantlib.data import datasets
from quantlib.export import bundle
from quantlib.measure import evaluation
from quantlib.report import tables
from quantlib.runtimes.available import default_engine, torchscript_on
from quantlib.store.journal import read_runs
from quantlib.store.local import Store

GREY_NET = """
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes),
    )
"""


def test_shared_stages_run_once_whatever_the_number_of_branches(undisturbed):
    home, _ = undisturbed
    labels = [line["label"] for line in harness.stage_lines(home) if "cached" in line]
    assert max(Counter(labels).values()) == 1
    assert {
        "load_float",
        "fuse-eval",
        "smooth-0.5",
        "fuse-eval-smoothed-0.5",
        "fuse-qat-smoothed-0.5",
        "decode-calibration-0",
    } <= set(labels)
    assert {"calibrate-per_channel", "convert-per_channel", "script_and_save-per_channel"} <= set(labels)
    assert {"qat_epoch-qat-0", "qat_epoch-qat-1", "choose_epoch-qat"} <= set(labels)


def test_each_file_of_a_variant_is_evaluated_once(undisturbed):
    home, outcome = undisturbed
    files = pd.read_parquet(home / "reports" / "files")
    expected = [f"evaluate-per_channel-{runtime}" for runtime in files[files.variant == "per_channel"].runtime]
    found = [name for name in outcome.stages if name.startswith("evaluate-per_channel") and "held_out" not in name]
    assert sorted(found) == sorted(expected)


def test_a_second_run_computes_nothing_and_reports_the_same(undisturbed, home_copy):
    _, expected = undisturbed
    again = harness.run(home_copy)
    assert again.error == ""
    assert all(again.stages.values())
    assert again.variants == expected.variants


def test_prefect_shows_reused_stages_as_cached_and_computed_ones_as_completed(undisturbed, home_copy):
    home, first = undisturbed
    names = {label: "Cached" if cached else "Completed" for label, cached in first.stages.items()}
    assert states_in_prefect(home, len(names)) == names
    assert set(names.values()) == {"Completed", "Cached"}  # Two branches that calibrate alike share that stage.
    again = harness.run(home_copy)
    assert states_in_prefect(home_copy, len(again.stages)) == dict.fromkeys(again.stages, "Cached")


def states_in_prefect(home, num_stages):
    """What Prefect shows for the home's newest run: the state of each stage's task run, by name."""
    flow_run = read_runs(home / "runs")[0].file.flow_run_id
    deadline = time.monotonic() + 60
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"]) as client:
        # Prefect takes states from a queue: the last ones appear a little later.
        while time.monotonic() < deadline:
            body = {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 200}
            runs = client.post("/task_runs/filter", json=body).json()
            states = {run["name"]: run["state_name"] for run in runs if not run["name"].startswith("write_report")}
            if len(states) == num_stages and not {"Running", "Pending"} & set(states.values()):
                return states
            time.sleep(0.2)
    raise AssertionError(f"not all states have arrived: {states}")


@pytest.mark.parametrize("table", tables.SCHEMAS)
def test_each_table_is_read_by_pyarrow_pandas_and_duckdb_in_one_glob(table, undisturbed):
    home, _ = undisturbed
    place = home / "reports" / table
    columns = {"run_id", *tables.SCHEMAS[table].names}
    with_arrow = ds.dataset(place, partitioning="hive").to_table()
    with_pandas = pd.read_parquet(place)
    with_duckdb = duckdb.sql(f"SELECT * FROM '{place}/*/*.parquet'").fetchall()
    assert set(with_arrow.column_names) == columns == set(with_pandas.columns)
    assert len(with_arrow) == len(with_pandas) == len(with_duckdb)
    # Layers are not requested here, and there are no examples if float and int8 agree.
    assert len(with_arrow) > 0 or table in {"layers", "examples"}


def test_top1_recomputed_from_predictions_is_the_reported_one(undisturbed):
    home, _ = undisturbed
    predictions = pd.read_parquet(home / "reports" / "predictions")
    variants = pd.read_parquet(home / "reports" / "variants")
    correct = predictions.label == predictions.top5.str[0]
    assert correct.groupby(predictions.variant).mean().to_dict() == pytest.approx(
        dict(zip(variants.variant, variants.top1, strict=True)), abs=1e-12
    )


def test_qat_reports_its_best_epoch_with_that_epochs_accuracy(undisturbed):
    home, _ = undisturbed
    epochs = pd.read_parquet(home / "reports" / "epochs")
    variant = pd.read_parquet(home / "reports" / "variants").set_index("variant").loc["qat"]
    if variant.kept_start:
        assert not epochs.best.any()
        assert variant.top1 == variant.top1_start
        assert epochs.top1_selection.max() <= variant.top1_selection
    else:
        best = epochs[epochs.best].iloc[0]
        assert best.epoch == variant.best_epoch
        assert best.top1 == variant.top1
        assert best.top1_selection == epochs.top1_selection.max() == variant.top1_selection
    assert list(epochs.batch_norm_frozen) == [True, True]
    assert list(epochs.observers_frozen) == [False, True]


def test_the_laid_out_file_gives_the_reported_top1_with_torch_alone(undisturbed, tmp_path):
    home, _ = undisturbed
    files = pd.read_parquet(home / "reports" / "files").set_index(["variant", "runtime"])
    file = files.loc["per_channel", torchscript_on(default_engine())]
    store = Store(home / "store")
    shard = store.path(store.find_record(harness.keys_done(home)["decode-validation-0"]).outputs[0])
    code = f"""
import numpy, torch, warnings
warnings.simplefilter("ignore")
with open({str(shard)!r}, "rb") as file:
    labels, _, pixels = (torch.from_numpy(numpy.load(file)) for _ in range(3))
x = pixels.permute(0, 3, 1, 2).float().div(255)
x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
model = torch.jit.load({file.path!r})
with torch.inference_mode():
    print(float((model(x).argmax(1) == labels).float().mean()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert float(done.stdout) == pytest.approx(file.top1, abs=1e-6)


def test_every_file_gives_the_reported_top1_in_the_runtime_that_it_is_reported_for(undisturbed):
    home, _ = undisturbed
    store = Store(home / "store")
    shard = store.path(store.find_record(harness.keys_done(home)["decode-validation-0"]).outputs[0])
    files = pd.read_parquet(home / "reports" / "files")
    variants = pd.read_parquet(home / "reports" / "variants").set_index("variant")
    assert {Path(path).suffix for path in files.path} == {".pt", ".onnx"}
    for file in files.itertuples():
        assert evaluation.evaluate_file(Path(file.path), file.runtime, shard, 16).top1 == file.top1
        if file.reported:
            row = variants.loc[file.variant]
            assert (row.artifact_path, row.runtime, row.top1) == (file.path, file.runtime, file.top1)
            assert (row.size_bytes, row.latency_p50_ms) == (file.size_bytes, file.latency_p50_ms)
    assert list(files[files.reported].variant) == ["per_channel", "qat"]


def test_every_file_handed_out_says_what_it_is_as_the_report_does_and_nothing_of_the_machines_folders(undisturbed):
    home, _ = undisturbed
    run_id = harness.run_id_of(home)
    variants = pd.read_parquet(home / "reports" / "variants").set_index("variant")
    files = pd.read_parquet(home / "reports" / "files").set_index("path")
    paths = [path for path in (home / "models" / run_id).iterdir() if path.suffix in {".pt", ".onnx"}]
    assert {path.name.partition(".")[0] for path in paths} == {"float", "per_channel", "qat"}
    for path in paths:
        info = bundle.read(path)
        (file,) = info.files
        row = variants.loc[info.variant]
        assert (info.run_id, info.classes, info.input_size) == (run_id, list("0123456789"), [3, 16, 16])
        assert (info.preprocessing.resize, info.preprocessing.mean) == ([16], [0.485, 0.456, 0.406])
        assert (file.name, info.method, info.recipe["name"]) == (path.name, row.method, "faults")
        assert (info.float_accuracy.top1, info.float_accuracy.num_images) == (variants.top1["float"], 60)
        if info.variant == "float":
            assert file.verdict == "baseline"
        else:
            found = files.loc[str(path)]
            assert (file.runtime, file.weights_sha256) == (found.runtime, found.sha256)
            assert (file.measured.accuracy.top1, file.measured.top1_drop) == (found.top1, found.top1_drop)
            assert file.measured.latency_p50_ms == found.latency_p50_ms
            assert (file.verdict == "winner") == (row.winner and found.reported)
        assert (home / "store" / "blobs" / file.weights_sha256[:2] / file.weights_sha256).is_file()
        assert str(home).encode() not in bundle.document(info)


def test_the_preprocessing_of_a_run_is_a_table(undisturbed):
    (row,) = tables.read_table(undisturbed[0] / "reports", "preprocessing").to_pylist()
    assert (row["channel_order"], row["resize"], row["crop"], row["antialias"]) == ("RGB", [16], [16, 16], True)


def test_nothing_is_recommended_for_a_runtime_that_the_gate_leaves_out(home_copy):
    recipe = harness.RECIPE | {"gate": harness.RECIPE["gate"] | {"runtimes": ["onnxruntime"]}}
    assert harness.run(home_copy, recipe=recipe).error == ""
    newest = read_runs(home_copy / "runs")[0].file.run_id
    variants = pd.read_parquet(home_copy / "reports" / "variants" / f"run_id={newest}")
    assert set(variants.runtime) == {"onnxruntime"}
    assert variants.winner.sum() == 1
    latency = pd.read_parquet(home_copy / "reports" / "latency" / f"run_id={newest}").set_index(
        ["variant", "runtime", "batch_size", "num_threads"]
    )
    in_float = latency.p50_ms["float", "onnxruntime", 1, 1]
    for row in variants.itertuples():
        assert row.latency_p50_ms == latency.p50_ms[row.variant, "onnxruntime", 1, 1]
        assert row.speedup == pytest.approx(in_float / row.latency_p50_ms)


def test_every_stage_is_named_after_its_branch_and_reported_with_its_key(undisturbed):
    home, outcome = undisturbed
    stages = pd.read_parquet(home / "reports" / "stages").set_index("stage")
    assert set(stages.index) == set(outcome.stages)
    assert stages.key.to_dict() == harness.keys_done(home)
    assert stages.cached.to_dict() == outcome.stages
    assert (stages.seconds > 0).all()


def test_prefect_shows_the_data_dependencies_each_once_and_no_other(undisturbed, home_copy, tmp_path):
    home, _ = undisturbed
    harness.run(home_copy)
    harness.run(tmp_path / "at_once", at_once=True)
    for place in (home, home_copy, tmp_path / "at_once"):  # Computed, reused, and computed in threads.
        found = edges_in_prefect(place)
        labels = [run["name"] for run in found]
        assert len(labels) == len(set(labels)) > 40
        expected = edges_of(place)
        shown = {}
        for run in found:
            inputs = [str(entry["id"]) for entries in run["task_inputs"].values() for entry in entries]
            assert len(inputs) == len(set(inputs)), run["name"]
            shown[run["name"]] = set(inputs)
        names = {run["id"]: run["name"] for run in found}
        for label, makers in expected.items():
            # Several stages may have made the same bytes, such as an epoch that changed nothing; any one may be shown.
            sources = {names[source] for source in shown[label]}
            assert sources <= set().union(*makers), (label, sources, makers)
            assert all(sources & each for each in makers), label
        # Prefect's graph repeats an edge for each input of the previous task, and its interface draws none above 500.
        assert sum(map(len, shown.values())) <= num_edges_drawn(place) < 2 * sum(map(len, shown.values())) < 400


def num_edges_drawn(home):
    """Arrows that the interface would have to draw for the home's newest run."""
    flow_run = read_runs(home / "runs")[0].file.flow_run_id
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"]) as client:
        nodes = client.get(f"/flow_runs/{flow_run}/graph-v2").json()["nodes"]
    return sum(len(node["children"]) for _, node in nodes)


def edges_in_prefect(home):
    """The task runs of the home's newest run, as Prefect has them."""
    num_stages = len(states_in_prefect(home, len({line["label"] for line in harness.newest_stage_lines(home)})))
    flow_run = read_runs(home / "runs")[0].file.flow_run_id
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"]) as client:
        body = {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 200}
        runs = client.post("/task_runs/filter", json=body).json()
    assert len(runs) == num_stages + 1  # And the report.
    return runs


def edges_of(home):
    """For each stage of the newest run, and each artifact named in its key: the stages that made that artifact."""
    store = Store(home / "store")
    records = {line["label"]: store.read_record(line["key"]) for line in harness.newest_stage_lines(home)}
    makers = {}
    for label, record in records.items():
        for ref in record.outputs:
            makers.setdefault(ref.sha256, set()).add(label)
    return {
        label: [makers[value] for value in dict.fromkeys(record.ingredients.values()) if value in makers]
        for label, record in records.items()
    }


def test_a_grey_and_rectangular_model_gets_images_as_it_was_trained_with(tmp_path, monkeypatch):
    (tmp_path / "grey_net.py").write_text(GREY_NET)
    monkeypatch.syspath_prepend(tmp_path)
    home = tmp_path / "home"
    input_ = {"resize": [24, 16], "crop": [20, 12], "interpolation": "bicubic"}
    done = harness.run(
        home,
        recipe=harness.RECIPE
        | {
            "model": {"architecture": "grey_net:build", "weights": "train", "training": {"epochs": 3}},
            "data": harness.RECIPE["data"] | input_ | {"channels": 1, "mean": [0.3], "std": [0.4]},
            "evaluation": {"num_held_out": 40},
        },
    )
    assert done.error == ""
    as_trained = transforms.Compose(
        [
            transforms.Grayscale(),
            transforms.Resize((24, 16), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop((20, 12)),
            transforms.ToTensor(),
            transforms.Normalize([0.3], [0.4]),
        ]
    )
    split, run_id = datasets.open_split("digits", None, "val"), harness.run_id_of(home)
    rows = tables.read_table(home / "reports", "predictions", run_id).to_pylist()
    x = torch.stack([as_trained(split.open(index)) for index in range(len(split))])
    for name, least in (("float", 0.999), ("per_channel", 0.95), ("qat", 0.95)):
        expected = [row["top5"][0] for row in rows if row["variant"] == name]  # In the dataset's order.
        model = api.load(home / "models" / run_id / f"{name}.pt", "torchscript")
        assert (model(x).argmax(1) == torch.tensor(expected)).float().mean() >= least


def test_an_exported_model_alone_is_quantized_and_a_copy_of_its_file_computes_nothing(tmp_path, stir_batch_norm):
    torch.manual_seed(0)
    net = stir_batch_norm(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(64, 10),
        )
    ).eval()
    first = exported.write(net, tmp_path / "net.pt2", any_number=False)
    input_ = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    recipe = harness.RECIPE | {"data": harness.RECIPE["data"] | input_, "evaluation": {"num_held_out": 40}}
    home = tmp_path / "home"

    done = harness.run(home, recipe=recipe | {"model": {"architecture": f"file:{first}"}})
    assert done.error == ""
    assert {"load_float", "fuse-qat-smoothed-0.5", "qat_epoch-qat-1"} <= set(done.stages)
    split, run_id = datasets.open_split("digits", None, "val"), harness.run_id_of(home)
    assert (home / "models" / run_id / "qat.onnxruntime.onnx").exists()
    rows = tables.read_table(home / "reports", "predictions", run_id).to_pylist()
    answers = [row["top5"][0] for row in rows if row["variant"] == "float"]
    as_trained = transforms.Compose(
        [transforms.Resize(32), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    )
    with torch.inference_mode():
        x = torch.stack([as_trained(split.open(index)) for index in range(len(split))])
        assert (net(x).argmax(1) == torch.tensor(answers)).float().mean() >= 0.999
        assert len(net(x).argmax(1).unique()) > 1

    copied = tmp_path / "elsewhere.pt2"
    copied.write_bytes((tmp_path / "net.pt2").read_bytes())
    (tmp_path / "net.pt2").unlink()
    again = harness.run(home, recipe=recipe | {"model": {"architecture": f"file:{copied}"}})
    assert again.error == ""
    assert all(again.stages.values())
