"""The verdict: rows from measurements, and the winner."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from quantlib import verdict
from quantlib.predictions import Predictions
from quantlib.recipe import GateRecipe
from quantlib.report import VariantRow
from quantlib.verdict import Circumstances, Epoch, Measured

CIRCUMSTANCES = Circumstances(
    recipe="test",
    selected_on="held_back",
    torch_version="2.15.0",
    cpu_model="a CPU",
    created_at=datetime(2025, 1, 2, tzinfo=UTC),
)


def _predictions(num_correct: int, num_images: int = 100) -> Predictions:
    """Six classes; those that are wrong have the label second."""
    labels = np.arange(num_images) % 6
    likeliest = np.where(np.arange(num_images) < num_correct, labels, (labels + 1) % 6)
    rest = [np.where(likeliest == labels, (labels + n) % 6, (labels + n - 1) % 6) for n in (1, 2, 3, 4)]
    return Predictions(labels, np.stack([likeliest, *rest], axis=1), np.full(num_images, 0.5, np.float32))


def _measured(name: str, num_correct: int, milliseconds: float = 1.0, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "name": name,
        "method": "float" if name == "float" else "ptq",
        "qconfig": None if name == "float" else "fbgemm",
        "engine": None if name == "float" else "x86",
        "validation": _predictions(num_correct),
        "selection": _predictions(num_correct),
        "simulated": {},
        "epochs": (),
        "samples_ms": {("torchscript" if name == "float" else "torchscript-x86", 1, 1): [milliseconds] * 3},
        "artifact_sha256": "ab" * 32,
        "artifact_path": f"models/{name}.pt",
        "size_bytes": 1000,
    }
    return Measured(**values | changes)


def _rows(*variants: Measured, gate: float = 0.01) -> dict[str, VariantRow]:
    return {row.variant: row for row in verdict.variant_rows(variants, GateRecipe(max_top1_drop=gate), CIRCUMSTANCES)}


def _winner(*variants: Measured, gate: float = 0.01) -> str | None:
    return next(
        (name for name, row in _rows(_measured("float", 90, 4.0), *variants, gate=gate).items() if row.winner), None
    )


# Rows


def test_a_row_says_what_was_measured() -> None:
    rows = _rows(_measured("float", 90, 4.0), _measured("a", 88, 1.6, selection=_predictions(70), size_bytes=250))
    row = rows["a"]

    assert (row.top1, row.top5, row.loss, row.num_images) == (0.88, 1.0, 0.5, 100)
    assert row.top1_drop == pytest.approx(0.02)
    assert row.top1_selection == 0.7
    assert row.latency_p50_ms == 1.6
    assert row.speedup == pytest.approx(2.5)
    assert row.size_bytes == 250
    assert (row.recipe, row.selected_on, row.cpu_model) == ("test", "held_back", "a CPU")
    assert (rows["float"].top1_drop, rows["float"].speedup, rows["float"].qconfig) == (0.0, 1.0, None)


def test_the_latency_is_the_median_of_a_batch_of_one_on_one_thread() -> None:
    ours = "torchscript-x86"
    samples = {(ours, 1, 1): [9.0, 1.0, 2.0], (ours, 50, 1): [0.1] * 3, (ours, 1, 2): [0.2] * 3}

    assert _rows(_measured("float", 90), _measured("a", 90, samples_ms=samples))["a"].latency_p50_ms == 2.0


def test_the_fastest_runtime_is_named_and_the_speedup_is_of_torchscript() -> None:
    samples = {("torchscript-x86", 1, 1): [2.0], ("openvino", 1, 1): [1.0], ("openvino", 50, 1): [9.0]}
    samples |= {("onnxruntime", 1, 1): [1.5], ("onnxruntime", 1, 2): [0.5]}
    onnx = verdict.Onnx(path="a.onnx", validation=_predictions(87))
    row = _rows(_measured("float", 90, 4.0), _measured("a", 88, samples_ms=samples, onnx=onnx))["a"]

    assert (row.fastest_runtime, row.fastest_p50_ms) == ("openvino", 1.0)
    assert (row.latency_p50_ms, row.speedup) == (2.0, 2.0)
    assert (row.onnx_path, row.onnx_top1, row.onnx_refusal) == ("a.onnx", 0.87, None)


def test_a_variant_without_an_onnx_file_says_why() -> None:
    rows = _rows(_measured("float", 90), _measured("a", 88, onnx=verdict.Onnx(refusal="no such operation")))

    assert (rows["a"].onnx_path, rows["a"].onnx_top1, rows["a"].onnx_refusal) == (None, None, "no such operation")
    assert rows["float"].onnx_refusal is None


def test_simulated_accuracies_are_there_where_they_were_asked_for() -> None:
    parts = {"both": _predictions(80), "weights": _predictions(85), "activations": _predictions(82)}
    rows = _rows(_measured("float", 90), _measured("a", 88, simulated=parts), _measured("b", 88))

    assert (rows["a"].top1_simulated, rows["a"].top1_weights_only, rows["a"].top1_activations_only) == (0.8, 0.85, 0.82)
    assert rows["b"].top1_simulated is rows["b"].top1_weights_only is rows["b"].top1_activations_only is None


def _epoch(number: int, num_correct: int, *, chosen: bool) -> Epoch:
    metrics = {
        "epoch": number,
        "loss": 0.3,
        "train_top1": 0.9,
        "num_images": 10,
        "observers_frozen": number > 3,
        "batch_norm_frozen": number > 2,
    }
    return Epoch(
        metrics=metrics, validation=_predictions(num_correct), selection=_predictions(num_correct + 1), chosen=chosen
    )


def test_epochs_have_their_rows_and_the_best_is_marked() -> None:
    epochs = (_epoch(0, 80, chosen=False), _epoch(1, 85, chosen=True), _epoch(4, 82, chosen=False))
    variants = [_measured("float", 90), _measured("qat", 85, method="qat", epochs=epochs)]

    rows = verdict.epoch_rows(variants)

    assert [(row.variant, row.epoch, row.top1, row.top1_selection, row.best) for row in rows] == [
        ("qat", 0, 0.80, 0.81, False),
        ("qat", 1, 0.85, 0.86, True),
        ("qat", 4, 0.82, 0.83, False),
    ]
    assert (rows[2].observers_frozen, rows[2].batch_norm_frozen, rows[2].loss) == (True, True, 0.3)
    assert _rows(*variants)["qat"].best_epoch == 1
    assert _rows(*variants)["float"].best_epoch is None


def test_latency_rows_give_percentiles_of_a_call_and_images_per_second() -> None:
    samples = {("torchscript", 1, 1): list(range(1, 102)), ("torchscript", 50, 2): [20.0] * 10}

    single, batch = verdict.latency_rows([_measured("float", 90, samples_ms=samples)])

    assert (single.batch_size, single.num_threads, single.num_samples) == (1, 1, 101)
    assert (single.p50_ms, single.p95_ms) == (51.0, 96.0)
    assert single.images_per_second == pytest.approx(1000 / 51)
    assert (batch.batch_size, batch.num_threads, batch.images_per_second) == (50, 2, pytest.approx(2500))


# The gate


@pytest.mark.parametrize(
    ("num_correct", "gate", "accepted"),
    [
        (89, 0.01, True),  # exactly the gate
        (88, 0.01, False),
        (83, 0.07, True),  # 0.9 - 0.83 is 0.07000000000000006 in float64
        (82, 0.07, False),
        (88, 0.018, False),  # two images of a hundred are more than 1.8 points
        (89, 0.018, True),
        (90, 0.0, True),
        (89, 0.0, False),
        (95, 0.0, True),  # better than float
    ],
)
def test_what_loses_no_more_than_the_gate_is_accepted(num_correct: int, gate: float, accepted: bool) -> None:
    rows = _rows(_measured("float", 90), _measured("a", num_correct), gate=gate)

    assert rows["a"].accepted == accepted
    assert rows["a"].winner == accepted


# The winner


def test_float_never_wins() -> None:
    assert _winner() is None


def test_there_is_no_winner_where_none_is_accepted() -> None:
    assert _winner(_measured("a", 80), _measured("b", 70)) is None


def test_the_fastest_of_those_inside_the_gate_wins() -> None:
    variants = _measured("slow", 90, 2.0), _measured("fast", 89, 1.0), _measured("fastest", 50, 0.5)

    assert _winner(*variants) == "fast"


@pytest.mark.parametrize(("milliseconds", "winner"), [(1.1, "b"), (1.11, "a")])
def test_within_a_tenth_of_the_fastest_the_more_accurate_wins(milliseconds: float, winner: str) -> None:
    assert _winner(_measured("a", 89, 1.0), _measured("b", 90, milliseconds)) == winner


def test_a_tenth_counts_from_the_fastest_and_not_from_the_next() -> None:
    variants = _measured("a", 89, 1.0), _measured("b", 90, 1.09), _measured("c", 91, 1.18)

    assert _winner(*variants) == "b"


def test_accuracy_is_compared_on_the_images_that_choices_are_made_by() -> None:
    # b is better on validation: to choose it for that would make its reported accuracy optimistic.
    variants = (
        _measured("a", 89, selection=_predictions(80)),
        _measured("b", 95, selection=_predictions(70)),
    )

    assert _winner(*variants) == "a"


def test_a_tie_goes_to_the_smaller_file_then_to_the_first() -> None:
    a, b, c = (_measured(name, 90, size_bytes=size) for name, size in (("a", 300), ("b", 200), ("c", 200)))

    assert _winner(a, b, c) == "b"
    assert _winner(a, c, b) == "c"


def test_the_winner_is_chosen_from_rows_alone() -> None:
    rows = _rows(_measured("float", 90), _measured("a", 90))

    assert verdict.choose_winner(list(rows.values())) == "a"
    assert verdict.choose_winner([replace(row, accepted=False) for row in rows.values()]) is None
    assert verdict.choose_winner([]) is None


def test_a_qat_that_kept_its_start_says_so() -> None:
    qat = _measured("qat", 99, method="qat", kept_start=True, start_validation=_predictions(99))
    row = _rows(_measured("float", 99, method="float"), qat)["qat"]
    assert (row.kept_start, row.best_epoch, row.top1_start) == (True, None, 0.99)


def test_the_fastest_runtimes_file_is_the_one_it_takes() -> None:
    samples = {("torchscript-x86", 1, 1): [2.0], ("openvino", 1, 1): [1.0]}
    onnx = verdict.Onnx(path="a.onnx", validation=_predictions(87))
    float_model = _measured("float", 90, 4.0)
    for milliseconds, path in ((1.0, "a.onnx"), (3.0, "models/a.pt")):
        own = samples | {("openvino", 1, 1): [milliseconds]}
        assert _rows(float_model, _measured("a", 88, samples_ms=own, onnx=onnx))["a"].fastest_path == path
    assert _rows(float_model)["float"].fastest_path == "models/float.pt"
