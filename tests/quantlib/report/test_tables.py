"""The report as others read it: Parquet tables, one folder per run."""

import errno
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from random import Random

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from rows import START, file_row, layer_row, preprocessing, variant_row

from quantlib.errors import MachineError, StoreError
from quantlib.measure.examples import Example
from quantlib.measure.predictions import Predictions
from quantlib.report import tables
from quantlib.report.results import Report
from quantlib.report.rows import ClassRow, EpochRow, LatencyRow, NoteRow, StageRow

# The contract: columns may be added, but not renamed.
COLUMNS = {
    "variants": "run_id, recipe, variant, method, qconfig, engine, top1, top5, num_images, top1_drop, size_bytes, "
    "latency_p50_ms, speedup, accepted, winner, artifact_sha256, artifact_path, torch_version, cpu_model, created_at",
    "epochs": "run_id, variant, epoch, loss, train_top1, top1, observers_frozen, batch_norm_frozen",
    "latency": "run_id, variant, runtime, batch_size, num_threads, p50_ms, p95_ms, images_per_second, num_samples",
    "predictions": "run_id, variant, image_index, image, label, top5",
    "stages": "run_id, stage, key, cached, seconds, started_at",
    "layers": "run_id, variant, layer, type, weight_min, weight_max, activation_min, activation_max, sqnr_db, "
    "saturation, top1_only, top1_all_but, divergence_only, num_images, measured_on",
}
# In addition, for the page that people look at.
MORE_COLUMNS = {
    "classes": "run_id, class_index, name",
    "examples": "run_id, variant, image_index, label, float_top1, int8_top1, png",
    "files": "run_id, variant, path, sha256, size_bytes, runtime, top1, top1_drop, top1_drop_low, top1_drop_high, "
    "p_value, top1_selection, latency_p50_ms, speedup, gate, num_images_to_decide, reported",
    "notes": "run_id, kind, text",
    "preprocessing": "run_id, channel_order, resize, crop, interpolation, antialias, mean, std",
}
# In the order they are written.
NUM_ROWS = {
    "epochs": 1,
    "latency": 1,
    "layers": 1,
    "predictions": 12,
    "classes": 3,
    "preprocessing": 1,
    "examples": 1,
    "stages": 2,
    "files": 1,
    "notes": 1,
    "variants": 3,
}


def _answers(num_correct):
    labels = np.array([0, 1, 2, 0])
    top5 = np.stack([(labels + n + (np.arange(4) >= num_correct)) % 3 for n in range(3)], axis=1)
    return Predictions(labels, top5, np.zeros(4, np.float32))


LAYER = layer_row("features.0")
IMAGES = ["val/cat/1.jpg", "val/cat/2.jpg", "val/dog/1.jpg", "val/dog/ä.png"]
PREDICTIONS = {"float": _answers(3), "a": _answers(2), "b": _answers(4)}


@pytest.fixture
def found():
    accuracy = {name: answers.top1 for name, answers in PREDICTIONS.items()}
    return Report(
        run_id="20250102-030405-test-abcd1234",
        variants=(
            variant_row("float", method="float", top1=accuracy["float"], accepted=False),
            variant_row("a", top1=accuracy["a"]),
            variant_row(
                "b", method="qat", size_bytes=1000, top1=accuracy["b"], best_epoch=1, top1_simulated=0.5, winner=True
            ),
        ),
        epochs=(
            EpochRow(
                variant="b",
                epoch=1,
                loss=0.3,
                train_top1=0.75,
                top1=1.0,
                top1_selection=1.0,
                best=True,
                observers_frozen=False,
                batch_norm_frozen=True,
            ),
        ),
        latency=(
            LatencyRow(
                variant="a",
                runtime="torchscript",
                batch_size=50,
                num_threads=1,
                p50_ms=10.0,
                p95_ms=12.0,
                images_per_second=5000.0,
                num_samples=100,
            ),
        ),
        stages=(
            StageRow("fuse-eval", "aa", cached=True, seconds=0.1, started_at=START),
            StageRow("convert-a", "bb", cached=False, seconds=1.5, started_at=START),
        ),
        classes=tuple(ClassRow(class_index=n, name=name) for n, name in enumerate(("red", "green", "blue"))),
        examples=(Example(variant="a", image_index=2, label=2, float_top1=2, int8_top1=0, png=b"\x89PNG\0"),),
        layers=(LAYER,),
        preprocessing=(preprocessing(),),
        files=(file_row("b"),),
        notes=(NoteRow(kind="warning", text="Few images."),),
    )


@pytest.fixture
def reports(tmp_path, found):
    """The folder with two runs' reports."""
    tables.write(tmp_path / "reports", found, PREDICTIONS, IMAGES)
    later = [replace(row, created_at=START + timedelta(days=1)) for row in found.variants]
    tables.write(tmp_path / "reports", replace(found, run_id="20250103-test", variants=tuple(later)), PREDICTIONS)
    return tmp_path / "reports"


# Readers


def _with_pyarrow(reports, table):
    return ds.dataset(reports / table, partitioning="hive").to_table().to_pandas()


def _with_pandas(reports, table):
    return pd.read_parquet(reports / table)


def _with_duckdb(reports, table):
    found = duckdb.sql(f"SELECT * FROM read_parquet('{reports}/{table}/*/*.parquet', hive_partitioning = true)")
    return pd.DataFrame(found.fetchall(), columns=found.columns)


READERS = [_with_pyarrow, _with_pandas, _with_duckdb]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("table", NUM_ROWS)
def test_every_table_of_all_runs_reads_with_one_glob(reports, read, table):
    rows = read(reports, table)

    assert set((COLUMNS | MORE_COLUMNS)[table].split(", ")) <= set(rows.columns)
    assert len(rows) == 2 * NUM_ROWS[table]
    assert sorted(rows["run_id"].astype(str).unique()) == ["20250102-030405-test-abcd1234", "20250103-test"]


def test_values_arrive_with_their_types(reports):
    rows = _with_duckdb(reports, "variants").sort_values(["run_id", "variant"]).reset_index()
    b = rows.iloc[1]

    assert b["variant"] == "b"
    assert (b["top1"], b["size_bytes"], b["winner"], b["best_epoch"]) == (1.0, 1000, True, 1)
    assert pd.Timestamp(b["created_at"]) == pd.Timestamp(START)
    assert pd.isna(rows.iloc[2]["qconfig"])  # float
    assert pd.isna(rows.iloc[0]["top1_simulated"])


def test_accuracy_recomputed_from_the_predictions_is_that_of_the_variants(reports):
    query = f"""
        SELECT variant, avg((p.top5[1] = label)::INT) AS recomputed, any_value(v.top1) AS top1, count(*) AS num_images
        FROM read_parquet('{reports}/predictions/*/*.parquet', hive_partitioning = true) p
        JOIN read_parquet('{reports}/variants/*/*.parquet', hive_partitioning = true) v USING (run_id, variant)
        GROUP BY run_id, variant ORDER BY variant
    """
    rows = duckdb.sql(query).fetchall()

    assert rows == [(name, top1, top1, 4) for name, top1 in (("a", 0.5), ("b", 1.0), ("float", 0.75)) for _ in range(2)]


def test_predictions_number_the_images_of_each_variant_from_zero(reports):
    rows = _with_pandas(reports, "predictions")
    first = rows[rows["run_id"].astype(str) == "20250103-test"]

    assert first["image_index"].tolist() == [0, 1, 2, 3] * 3
    assert first["top5"].iloc[0].tolist() == [0, 1, 2]


def test_predictions_name_the_images(reports):
    rows = _with_pandas(reports, "predictions")
    assert rows[rows["run_id"].astype(str) != "20250103-test"]["image"].tolist() == IMAGES * 3
    assert rows[rows["run_id"].astype(str) == "20250103-test"]["image"].isna().all()


# Writing


def test_a_run_that_is_written_again_is_replaced(reports, found):
    tables.write(reports, replace(found, stages=found.stages[:1]), PREDICTIONS)

    rows = _with_pandas(reports, "stages")
    assert (rows["run_id"] == found.run_id).sum() == 1
    assert len(rows) == 1 + 2


def test_tables_without_rows_still_have_their_columns(tmp_path, found):
    tables.write(tmp_path, replace(found, epochs=()), PREDICTIONS)

    rows = _with_duckdb(tmp_path, "epochs")
    assert len(rows) == 0
    assert set(COLUMNS["epochs"].split(", ")) <= set(rows.columns)


@pytest.mark.parametrize("read", READERS)
def test_a_reader_sees_nothing_of_a_run_that_is_being_written(reports, found, read, monkeypatch):
    write_table, counts = pq.write_table, []

    def write_and_read(table, where, **options):
        write_table(table, where, **options)
        counts.append({name: len(read(reports, name)) for name in NUM_ROWS})

    monkeypatch.setattr(pq, "write_table", write_and_read)
    tables.write(reports, replace(found, run_id="third"), PREDICTIONS)

    # When the n-th file is complete, the tables before it exist, but its own does not.
    order = list(NUM_ROWS)
    assert counts == [
        {name: NUM_ROWS[name] * (3 if order.index(name) < step else 2) for name in order} for step in range(len(order))
    ]


def test_a_failure_leaves_nothing_behind_and_no_row_in_variants(reports, found, monkeypatch):
    flush = os.fsync
    calls: list[int] = []

    def fill_the_disk(file):
        calls.append(file)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(file)

    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with pytest.raises(MachineError, match="disk is full"):
        tables.write(reports, replace(found, run_id="third"), PREDICTIONS)

    assert not [path for path in reports.rglob("*") if path.name.startswith(".")]
    assert len(_with_pandas(reports, "variants")) == 6
    assert len(_with_pandas(reports, "stages")) == 4


def test_others_may_read_what_is_written(reports):
    folder = next((reports / "variants").iterdir())

    assert folder.stat().st_mode & 0o777 == 0o755
    assert os.access(folder / "part-0.parquet", os.R_OK)


# Reading back


def test_variants_come_back_the_newest_run_first_in_the_recipes_order(reports, found):
    rows = tables.read_variants(reports)

    assert [run_id for run_id, _ in rows] == ["20250103-test"] * 3 + [found.run_id] * 3
    assert tuple(row for _, row in rows[3:]) == found.variants


def test_before_the_first_run_there_is_nothing(tmp_path):
    assert tables.read_variants(tmp_path / "reports") == []
    assert tables.read_table(tmp_path / "reports", "stages").num_rows == 0


def test_no_flipped_bit_changes_what_is_read_nor_escapes_as_another_error(reports, found):
    random = Random(0)
    for name in NUM_ROWS:
        right = tables.read_table(reports, name, found.run_id)
        (path,) = (reports / name).glob(f"run_id={found.run_id}/*.parquet")
        whole = path.read_bytes()
        for _ in range(300):
            place = random.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.randrange(8))]) + whole[place + 1 :])
            with pytest.raises(
                StoreError, match=rf"{path} is damaged .* `quantflow resume {found.run_id}` rebuilds it"
            ):
                tables.read_table(reports, name, found.run_id)
        path.write_bytes(whole)
        assert tables.read_table(reports, name, found.run_id) == right


def test_damage_to_a_file_without_a_hash_raises_no_other_error(reports, found):
    (path,) = (reports / "variants").glob(f"run_id={found.run_id}/*.parquet")
    (path.parent / "_part-0.sha256").unlink()
    whole, random, refused, changed = path.read_bytes(), Random(0), 0, 0
    right = tables.read_table(reports, "variants", found.run_id)
    for _ in range(500):
        place = random.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.randrange(8))]) + whole[place + 1 :])
        try:
            changed += tables.read_table(reports, "variants", found.run_id) != right
        except StoreError:
            refused += 1
    assert refused > 100  # Detected by the checksums of the pages.
    assert changed < 15  # In headers, which those checksums do not cover; without checksums it is 19.


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), Path.touch])
def test_what_is_not_a_report_is_reported_and_the_other_runs_are_read(reports, found, make):
    (path,) = (reports / "variants").glob(f"run_id={found.run_id}/*.parquet")
    path.unlink()
    make(path)
    damage: list[StoreError] = []

    assert {run_id for run_id, _ in tables.read_variants(reports, damage.append)} == {"20250103-test"}
    assert [str(path) in str(error) for error in damage] == [True]
    with pytest.raises(StoreError, match="is damaged"):
        tables.read_variants(reports)


def test_a_report_of_an_earlier_version_lacks_columns_but_is_still_readable(reports):
    path = next((reports / "variants").glob("run_id=20250103-test/*.parquet"))
    (path.parent / "_part-0.sha256").unlink()
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["loss"]), path)

    rows = {row.variant: row for run_id, row in tables.read_variants(reports) if run_id == "20250103-test"}

    assert rows["b"].loss is None
    assert rows["b"].top1 == 1.0


# Winner and best


def test_the_winner_is_the_best(found):
    assert found.winner == found.best == found.variants[2]


def test_without_a_winner_the_best_is_the_quantized_model_that_chose_best(found):
    none = replace(
        found,
        variants=(
            replace(found.variants[0], top1_selection=0.99),  # float is never the best
            replace(found.variants[1], top1_selection=0.8, top1=0.1),
            replace(found.variants[2], top1_selection=0.7, winner=False),
        ),
    )

    assert none.winner is None
    assert none.best.variant == "a"


def test_remarks_name_the_qat_that_kept_its_start_and_the_variant_with_too_few_images(found):
    assert found.remarks == []
    kept = variant_row("q", method="qat", kept_start=True)
    undecided = variant_row("u", gate="undecided", num_images_to_decide=12345)
    remarks = replace(found, variants=(kept, undecided)).remarks
    assert "q: no epoch of training was better" in remarks[0]
    assert "about 12,345" in remarks[1]
    assert kept.title == "q (start)"
    assert [row.title for row in found.variants] == ["float", "a", "b (epoch 1)"]
