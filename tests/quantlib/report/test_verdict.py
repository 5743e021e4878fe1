"""The verdict: rows from measurements, and the winner."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from quantlib.measure.predictions import Predictions
from quantlib.recipe.sections import GateRecipe
from quantlib.recipe.variant import Variant
from quantlib.report import choice, verdict
from quantlib.report.measured import Epoch, File, Measured, epoch_rows, latency_rows
from quantlib.report.results import Report
from quantlib.report.rows import FileRow, VariantRow
from quantlib.report.verdict import RunInfo
from quantlib.runtimes.available import Runtime

CIRCUMSTANCES = RunInfo(
    recipe="test",
    selected_on="held_out",
    torch_version="2.15.0",
    cpu_model="a CPU",
    created_at=datetime(2025, 1, 2, tzinfo=UTC),
)


def _predictions(num_correct, num_images=100):
    """Predictions over six classes; wrong ones rank the label second."""
    labels = np.arange(num_images) % 6
    likeliest = np.where(np.arange(num_images) < num_correct, labels, (labels + 1) % 6)
    rest = [np.where(likeliest == labels, (labels + n) % 6, (labels + n - 1) % 6) for n in (1, 2, 3, 4)]
    return Predictions(labels, np.stack([likeliest, *rest], axis=1), np.full(num_images, 0.5, np.float32))


def _file(name, num_correct, **changes):
    values: dict[str, Any] = {
        "path": f"models/{name}.pt",
        "sha256": "ab" * 32,
        "size_bytes": 1000,
        "runtime": "torchscript" if name == "float" else "torchscript-x86",
        "validation": _predictions(num_correct),
        "selection": _predictions(num_correct),
    }
    return File(**values | changes)


def _measured(name, num_correct, milliseconds=1.0, **changes):
    """A variant with one file; `selection` and `size_bytes` are that file's."""
    of_file = {key: changes.pop(key) for key in ("selection", "size_bytes") if key in changes}
    file = _file(name, num_correct, **of_file)
    of_variant = {
        key: changes.pop(key) for key in ("method", "scheme", "equalized", "bias_corrected") if key in changes
    }
    known = {"method": "ptq", "qconfig": "fbgemm", "engine": "x86"} if name != "float" else {"method": "float"}
    values: dict[str, Any] = {
        "variant": Variant(**{"name": name} | known | of_variant),
        "files": (file,),
        "simulated": {},
        "epochs": (),
        "samples_ms": {(file.runtime, 1, 1): [milliseconds] * 50},
        "torchscript_path": file.path,
    }
    return Measured(**values | changes)


@dataclass(frozen=True)
class _Found:
    """Everything in a verdict."""

    variants: tuple[VariantRow, ...]
    files: tuple[FileRow, ...]
    reported: tuple[File, ...]


def _verdict(*variants, **gate):
    judged = verdict.judge(variants, GateRecipe(**{"max_top1_drop": 0.01} | gate))
    return _Found(judged.variant_rows(CIRCUMSTANCES), judged.file_rows(), judged.reported)


def _rows(*variants, gate=0.01):
    return {row.variant: row for row in _verdict(*variants, max_top1_drop=gate).variants}


def _won(*variants, gate=0.01):
    rows = _rows(_measured("float", 90, 4.0), *variants, gate=gate).values()
    return next((row for row in rows if row.winner), None)


def _winner(*variants, gate=0.01):
    row = _won(*variants, gate=gate)
    return row.variant if row else None


def _noisy(milliseconds, seed):
    """Very noisy timings around a median."""
    return {("torchscript-x86", 1, 1): list(milliseconds * np.random.default_rng(seed).lognormal(0, 0.1, 50))}


# Rows


def test_a_row_says_what_was_measured():
    rows = _rows(_measured("float", 90, 4.0), _measured("a", 88, 1.6, selection=_predictions(70), size_bytes=250))
    row = rows["a"]

    assert (row.top1, row.top5, row.loss, row.num_images) == (0.88, 1.0, 0.5, 100)
    assert row.top1_drop == pytest.approx(0.02)
    assert row.top1_selection == 0.7
    assert row.latency_p50_ms == 1.6
    assert row.speedup == pytest.approx(2.5)
    assert row.size_bytes == 250
    assert (row.recipe, row.selected_on, row.cpu_model) == ("test", "held_out", "a CPU")
    assert (rows["float"].top1_drop, rows["float"].speedup, rows["float"].qconfig) == (0.0, 1.0, None)


def test_the_latency_is_the_median_of_a_batch_of_one_on_one_thread():
    ours = "torchscript-x86"
    samples = {(ours, 1, 1): [9.0, 1.0, 2.0], (ours, 50, 1): [0.1] * 3, (ours, 1, 2): [0.2] * 3}
    variants = (
        _measured("float", 90, samples_ms={("torchscript", 1, 1): [4.0] * 3}),
        _measured("a", 90, samples_ms=samples),
    )

    assert _rows(*variants)["a"].latency_p50_ms == 2.0


def _with_onnx(name, *, pt, onnx, pt_ms, onnx_ms, engine="x86"):
    """A variant in TorchScript, and as ONNX in OpenVINO."""
    own = "torchscript" if engine is None else f"torchscript-{engine}"
    return _measured(
        name,
        pt,
        files=(
            _file(name, pt),
            _file(name, onnx, path=f"models/{name}.onnx", sha256="cd" * 32, size_bytes=1100, runtime="openvino"),
        ),
        samples_ms={(own, 1, 1): [pt_ms] * 50, ("openvino", 1, 1): [onnx_ms] * 50, ("onnxruntime", 1, 1): [9.0] * 50},
        onnx_paths=(f"models/{name}.onnx",),
    )


def test_accuracy_size_latency_and_speedup_are_of_the_file_to_ship_in_its_runtime():
    float_model = _with_onnx("float", pt=90, onnx=90, pt_ms=8.0, onnx_ms=3.0, engine=None)
    found = _verdict(float_model, _with_onnx("a", pt=91, onnx=89, pt_ms=2.0, onnx_ms=1.0))
    row = found.variants[1]

    assert (row.runtime, row.artifact_path, row.artifact_sha256) == ("openvino", "models/a.onnx", "cd" * 32)
    assert (row.top1, row.size_bytes, row.latency_p50_ms) == (0.89, 1100, 1.0)
    assert row.speedup == 3.0  # Against float in its own fastest runtime, not in the slow one.
    assert (row.torchscript_path, row.onnx_path, row.onnx_top1) == ("models/a.pt", "models/a.onnx", 0.89)
    assert row.load == 'quantlib.api.load("models/a.onnx", "openvino")'
    assert found.reported[1].path == "models/a.onnx"
    assert [(file.path, file.top1, file.reported) for file in found.files] == [
        ("models/a.pt", 0.91, False),
        ("models/a.onnx", 0.89, True),
    ]


def test_the_gate_judges_the_file_that_is_shipped_and_not_another_of_the_same_variant():
    # Inside the gate in TorchScript, outside in the faster runtime: the slower file is the one to ship.
    found = _verdict(_measured("float", 90, 4.0), _with_onnx("a", pt=90, onnx=80, pt_ms=2.0, onnx_ms=1.0))
    row = found.variants[1]

    assert [(file.path, file.gate) for file in found.files] == [
        ("models/a.pt", "inside"),
        ("models/a.onnx", "outside"),
    ]
    assert (row.winner, row.runtime, row.top1, row.latency_p50_ms) == (True, "torchscript-x86", 0.9, 2.0)
    assert (row.fastest_runtime, row.fastest_p50_ms) == ("openvino", 1.0)


def test_a_variant_that_does_not_win_is_shown_by_its_file_inside_the_gate():
    faster = _measured("b", 90, 0.5)
    found = _verdict(_measured("float", 90, 4.0), _with_onnx("a", pt=90, onnx=80, pt_ms=2.0, onnx_ms=1.0), faster)

    assert [row.winner for row in found.variants] == [False, False, True]
    assert (found.variants[1].runtime, found.variants[1].accepted) == ("torchscript-x86", True)


def test_a_variant_that_has_no_file_for_an_allowed_runtime_is_not_accepted():
    found = _verdict(_measured("float", 90, 4.0), _measured("a", 90, available=False, onnx_refusal="no such operation"))

    assert (found.variants[1].gate, found.variants[1].accepted, found.variants[1].winner) == (
        "unavailable",
        False,
        False,
    )
    assert found.variants[1].onnx_refusal == "no such operation"
    assert found.files == ()


def test_a_file_is_meant_for_the_first_of_the_runtimes_that_are_fastest_within_noise():
    x86, onednn, fbgemm = (Runtime(f"torchscript-{name}", "1") for name in ("x86", "onednn", "fbgemm"))
    machine = np.random.default_rng(0).uniform(1, 2, 50)
    noise = np.random.default_rng(1).lognormal(0, 0.1, 50)

    assert choice.fastest_runtime({x86: machine, onednn: machine * noise, fbgemm: machine * 1.2}) == x86
    assert choice.fastest_runtime({x86: machine, onednn: machine * 0.9}) == onednn


def test_of_an_onnx_file_for_each_runtime_the_fastest_is_named_with_its_accuracy_there():
    files = (
        _file("a", 90),
        _file("a", 89, path="models/a.onnxruntime.onnx", runtime="onnxruntime"),
        _file("a", 88, path="models/a.openvino.onnx", runtime="openvino"),
    )
    milliseconds = {"torchscript-x86": 1.0, "onnxruntime": 3.0, "openvino": 2.0}
    variant = _measured(
        "a",
        90,
        files=files,
        samples_ms={(runtime, 1, 1): [each] * 50 for runtime, each in milliseconds.items()},
        onnx_paths=("models/a.onnxruntime.onnx", "models/a.openvino.onnx"),
    )
    row = _rows(_measured("float", 90, 4.0), variant)["a"]

    assert (row.artifact_path, row.torchscript_path) == ("models/a.pt", "models/a.pt")
    assert (row.onnx_path, row.onnx_top1) == ("models/a.openvino.onnx", 0.88)


def test_an_onnx_file_that_may_not_be_shipped_is_named_without_accuracy():
    row = _rows(_measured("float", 90, 4.0), _measured("a", 90, onnx_paths=("models/a.onnx",)))["a"]

    assert (row.artifact_path, row.onnx_path, row.onnx_top1) == ("models/a.pt", "models/a.onnx", None)


def test_a_variant_without_a_torchscript_file_says_why_and_is_judged_by_its_onnx_file():
    variant = _measured(
        "a",
        90,
        files=(_file("a", 89, path="models/a.onnx", runtime="openvino"),),
        samples_ms={("openvino", 1, 1): [1.0] * 50},
        torchscript_path=None,
        torchscript_refusal="The model cannot be written as TorchScript: too dynamic.",
        onnx_paths=("models/a.onnx",),
    )
    row = _rows(_measured("float", 90, 4.0), variant)["a"]

    assert (row.torchscript_path, row.torchscript_refusal) == (None, variant.torchscript_refusal)
    assert (row.winner, row.artifact_path, row.runtime, row.top1) == (True, "models/a.onnx", "openvino", 0.89)
    assert (row.fastest_runtime, row.onnx_top1, row.onnx_refusal) == ("openvino", 0.89, None)


def test_simulated_accuracies_are_reported_where_they_were_requested():
    parts = {"both": _predictions(80), "weights": _predictions(85), "activations": _predictions(82)}
    rows = _rows(_measured("float", 90), _measured("a", 88, simulated=parts), _measured("b", 88))

    assert (rows["a"].top1_simulated, rows["a"].top1_weights_only, rows["a"].top1_activations_only) == (0.8, 0.85, 0.82)
    assert rows["b"].top1_simulated is rows["b"].top1_weights_only is rows["b"].top1_activations_only is None


def _epoch(number, num_correct, *, chosen):
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


def test_epochs_have_their_rows_and_the_best_is_marked():
    epochs = (_epoch(0, 80, chosen=False), _epoch(1, 85, chosen=True), _epoch(4, 82, chosen=False))
    variants = [_measured("float", 90), _measured("qat", 85, method="qat", epochs=epochs)]

    rows = epoch_rows(variants)

    assert [(row.variant, row.epoch, row.top1, row.top1_selection, row.best) for row in rows] == [
        ("qat", 0, 0.80, 0.81, False),
        ("qat", 1, 0.85, 0.86, True),
        ("qat", 4, 0.82, 0.83, False),
    ]
    assert (rows[2].observers_frozen, rows[2].batch_norm_frozen, rows[2].loss) == (True, True, 0.3)
    assert _rows(*variants)["qat"].best_epoch == 1
    assert _rows(*variants)["float"].best_epoch is None


def test_latency_rows_give_percentiles_of_a_call_and_images_per_second():
    samples = {("torchscript", 1, 1): list(range(1, 102)), ("torchscript", 50, 2): [20.0] * 10}

    single, batch = latency_rows([_measured("float", 90, samples_ms=samples)])

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
def test_what_loses_no_more_than_the_gate_is_accepted(num_correct, gate, accepted):
    rows = _rows(_measured("float", 90), _measured("a", num_correct), gate=gate)

    assert rows["a"].accepted == accepted
    assert rows["a"].winner == accepted


@pytest.mark.parametrize(
    ("milliseconds", "min_speedup", "outcome"),
    [
        (4.2, 1.0, "slower"),  # In every round, so it is beyond noise.
        (4.0, 1.0, "inside"),
        (3.8, 1.0, "inside"),
        (400.0, 0.0, "inside"),  # Any speed will do.
        (2.1, 2.0, "slower"),  # Faster than float, but not twice as fast.
        (1.9, 2.0, "inside"),
        (7.9, 0.5, "inside"),  # It may take twice as long.
        (8.1, 0.5, "slower"),
    ],
)
def test_a_file_that_is_not_as_fast_as_the_gate_asks_is_never_the_winner(milliseconds, min_speedup, outcome):
    found = _verdict(_measured("float", 90, 4.0), _measured("a", 95, milliseconds), min_speedup=min_speedup)
    row = found.variants[1]

    inside = outcome == "inside"
    assert (row.gate, row.accepted, row.winner, found.files[0].gate) == (outcome, inside, inside, outcome)
    assert row.verdict == ("winner" if inside else "slower")
    assert (row.pareto, row.reason is None) == (True if inside else None, not inside)


def test_a_gate_that_asks_for_no_speed_asks_for_floats():
    assert _rows(_measured("float", 90, 1.0), _measured("a", 90, 1.1))["a"].gate == "slower"
    assert _rows(_measured("float", 90, 1.0), _measured("a", 90, 0.9))["a"].gate == "inside"


def test_float_is_inside_however_fast_the_gate_asks_for():
    row = _verdict(_measured("float", 90, 4.0), _measured("a", 90, 1.0), min_speedup=3.0).variants[0]

    assert (row.gate, row.accepted, row.verdict) == ("inside", True, "baseline")


def test_a_file_that_is_slower_only_within_the_noise_of_timing_is_inside_the_gate():
    floats, own = _noisy(1.0, 3), _noisy(1.03, 4)
    float_model = _measured("float", 90, samples_ms={("torchscript", 1, 1): floats["torchscript-x86", 1, 1]})
    row = _rows(float_model, _measured("a", 90, samples_ms=own))["a"]

    assert (row.speedup < 1, row.gate, row.winner) == (True, "inside", True)


def test_a_file_is_compared_with_float_round_by_round():
    # The machine is up to twice as slow in some rounds, which affects both: the file is slower in each of them.
    machine = np.random.default_rng(0).uniform(1, 2, 50)
    float_model = _measured("float", 90, samples_ms={("torchscript", 1, 1): list(machine)})

    assert _rows(float_model, _measured("a", 90, samples_ms={("torchscript-x86", 1, 1): list(machine * 1.02)}))[
        "a"
    ].gate == ("slower")


def test_a_file_must_be_as_fast_as_float_is_in_its_fastest_allowed_runtime():
    variant = _measured("a", 90, 4.0)
    both = _with_onnx("float", pt=90, onnx=90, pt_ms=8.0, onnx_ms=3.0, engine=None)

    assert _rows(both, variant)["a"].gate == "slower"
    # What is timed but may not be shipped sets no standard.
    only_torchscript = _measured("float", 90, files=both.files[:1], samples_ms=both.samples_ms)
    assert _rows(only_torchscript, variant)["a"].gate == "inside"


@pytest.mark.parametrize("confidence", [None, 0.95])
def test_a_file_that_loses_too_much_is_outside_and_not_slower_however_slow_it_is(confidence):
    found = _verdict(_measured("float", 90, 4.0), _measured("a", 60, 9.0), confidence=confidence)

    assert found.variants[1].gate == "outside"


def test_a_file_that_is_too_slow_is_slower_and_not_undecided_as_no_number_of_images_would_help():
    row = _verdict(_measured("float", 90, 4.0), _measured("a", 90, 9.0), confidence=0.95).variants[1]

    assert (row.gate, row.num_images_to_decide) == ("slower", None)


def test_a_file_that_is_fast_enough_wins_over_one_of_the_same_variant_that_is_not():
    found = _verdict(_measured("float", 90, 4.0), _with_onnx("a", pt=90, onnx=90, pt_ms=5.0, onnx_ms=2.0))

    assert [file.gate for file in found.files] == ["slower", "inside"]
    assert (found.variants[1].winner, found.variants[1].runtime) == (True, "openvino")


def test_the_report_says_of_what_is_slower_how_to_ship_it_all_the_same():
    variants = (
        _measured("float", 90, 4.0),
        _measured("slow", 90, 5.0),
        _measured("fast", 90, 2.0),
        _measured("bad", 10, 9.0),
    )
    rows = _verdict(*variants).variants
    report = Report(run_id="run", variants=rows, epochs=(), latency=(), stages=())

    assert report.remarks == [
        "slow: accurate enough, but 0.80x as fast as float; gate.min_speedup = 0 would ship it for its size alone."
    ]
    assert report.winner is rows[2]


# The winner


def test_float_never_wins():
    assert _winner() is None


def test_there_is_no_winner_where_none_is_accepted():
    assert _winner(_measured("a", 80), _measured("b", 70)) is None


def test_the_fastest_of_those_inside_the_gate_wins():
    variants = _measured("slow", 90, 2.0), _measured("fast", 89, 1.0), _measured("fastest", 50, 0.5)

    assert _winner(*variants) == "fast"


def test_a_file_that_is_faster_in_nearly_every_round_wins_however_small_the_difference():
    a, b = _measured("a", 89, 1.0), _measured("b", 95, 1.05)

    assert _winner(a, b) == "a"
    assert _won(a, b).reason == "the fastest inside the gate"


def test_within_the_noise_of_timing_the_more_accurate_wins_if_chance_does_not_explain_it():
    # Comparing medians would say otherwise: by those, a is 3% faster.
    a = _measured("a", 89, samples_ms=_noisy(1.0, 3))
    b = _measured("b", 99, samples_ms=_noisy(1.03, 4))
    c = _measured("c", 96, samples_ms=_noisy(1.03, 5), size_bytes=900)

    assert _winner(a, b) == "b"
    assert _won(a, b).reason == "as fast as a (within noise), and more accurate"
    assert _winner(a, b, c) == "c"
    assert _won(a, b, c).reason == "as fast as a and b (within noise), among the most accurate of them, smallest"


@pytest.mark.parametrize(
    ("confidence", "num_lost", "outcome"),
    [
        (None, 10, "inside"),  # Exactly the gate.
        (None, 11, "outside"),
        (0.95, 8, "undecided"),
        (0.95, 40, "outside"),
    ],
)
def test_the_gate_is_undecided_only_where_it_asks_for_confidence(confidence, num_lost, outcome):
    before, after = _predictions(1000, 1000), _predictions(1000 - num_lost, 1000)
    float_model = _measured("float", 0, 4.0, files=(_file("float", 0, validation=before, selection=before),))
    variant = _measured("a", 0, files=(_file("a", 0, validation=after, selection=after),))
    row = _verdict(float_model, variant, confidence=confidence).variants[1]

    assert (row.gate, row.accepted) == (outcome, outcome == "inside")
    assert (row.num_images_to_decide is not None and row.num_images_to_decide > 1000) == (outcome == "undecided")


def test_what_is_drawn_as_the_front_holds_the_winner_and_nothing_that_is_beaten_beyond_noise():
    rows = _rows(
        _measured("float", 90, 8.0),
        _measured("winner", 95, samples_ms=_noisy(1.03, 3), size_bytes=500),
        _measured("as good", 96, samples_ms=_noisy(1.0, 4)),
        _measured("slower", 95, samples_ms=_noisy(2.0, 5)),
        _measured("slower and better", 100, samples_ms=_noisy(2.0, 6)),
        _measured("outside", 50, samples_ms=_noisy(0.1, 7)),
        gate=0.02,
    )

    assert {name: row.pareto for name, row in rows.items()} == {
        "float": None,
        "winner": True,
        "as good": True,
        "slower": False,
        "slower and better": False,
        "outside": None,
    }
    assert rows["winner"].winner


def test_the_front_holds_what_is_slower_but_surely_better_and_not_what_is_as_fast_but_surely_worse():
    rows = _rows(
        _measured("float", 95, 8.0),
        _measured("best", 95, samples_ms=_noisy(1.0, 3)),
        _measured("surely worse", 85, samples_ms=_noisy(1.0, 4)),
        gate=0.2,
    )
    assert [rows[name].pareto for name in ("best", "surely worse")] == [True, False]
    worse = _rows(
        _measured("float", 95, 8.0),
        _measured("fast", 85, samples_ms=_noisy(1.0, 3)),
        _measured("surely better", 100, samples_ms=_noisy(2.0, 5)),
        gate=0.2,
    )
    assert [worse[name].pareto for name in ("fast", "surely better")] == [True, True]


def test_accuracy_is_compared_on_the_selection_images():
    # b is better on validation, but choosing it for that would make its reported accuracy optimistic.
    variants = (
        _measured("a", 89, selection=_predictions(80)),
        _measured("b", 95, selection=_predictions(70)),
    )

    assert _winner(*variants) == "a"


def test_a_tie_goes_to_the_smaller_file_then_to_the_first():
    a, b, c = (_measured(name, 90, size_bytes=size) for name, size in (("a", 300), ("b", 200), ("c", 200)))

    assert _winner(a, b) == "b"
    assert _won(a, b).reason == "as fast as a (within noise), as accurate, smallest"
    assert _winner(a, b, c) == "b"
    assert _winner(a, c, b) == "c"
    assert _won(a, c, b).reason == "as fast as a and b (within noise), as accurate, as small, and first in the recipe"
    assert _won(a).reason == "the only file inside the gate"


def test_a_qat_that_kept_its_start_says_so():
    qat = _measured("qat", 99, method="qat", kept_start=True, start_validation=_predictions(99))
    row = _rows(_measured("float", 99, method="float"), qat)["qat"]
    assert (row.kept_start, row.best_epoch, row.top1_start) == (True, None, 0.99)


# How certain the order of the fastest is


def _lead(*variants):
    return verdict.judge([_measured("float", 90, 4.0), *variants], GateRecipe(max_top1_drop=0.01)).lead


def test_the_lead_says_how_certain_the_fastest_inside_the_gate_is_ahead_of_the_next():
    outside = _measured("careless", 50, 0.5)
    found = _lead(_measured("a", 90, 1.0), _measured("b", 90, 2.0), outside)
    assert (
        found
        == "a is faster than b, the next inside the gate, with more than 99.9% certainty after 50 rounds of timing."
    )


def test_the_lead_is_over_float_if_no_other_file_is_inside():
    assert _lead(_measured("a", 90, 1.0)).startswith("a is faster than float, the next inside the gate, with ")


def test_no_lead_is_claimed_within_noise():
    found = _lead(_measured("a", 90, samples_ms=_noisy(1.0, 0)), _measured("b", 90, samples_ms=_noisy(1.01, 1)))
    assert "the fastest inside the gate, are as fast as each other within noise after 50 rounds of timing." in found


def test_there_is_no_lead_if_nothing_is_inside_the_gate():
    assert _lead(_measured("a", 50, 1.0)) == ""
