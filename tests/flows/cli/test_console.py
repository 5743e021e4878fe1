"""What a terminal of 80 columns shows."""

import io
from dataclasses import replace
from datetime import UTC, datetime

from rich.console import Console
from rows import layer_row, variant_row

from flows.cli.console import conclusion, interval_table, result_table, runs_table, why
from quantlib.report.diagnosis import diagnose
from quantlib.report.results import Report
from quantlib.report.rows import NoteRow
from quantlib.store.journal import RunFile, RunStatus


def _wide_row(name, **changes):
    """A row with figures as long as real ones get."""
    wide = {"top1_drop": 0.5184, "size_bytes": 8_918_000, "latency_p50_ms": 12.34, "runtime": "torchscript-onednn"}
    return variant_row(name, **wide | changes)


def _report(*variants, layers=()):
    return Report(run_id="r", variants=variants, epochs=(), latency=(), stages=(), layers=layers)


def _shown(*parts):
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part, highlight=False, markup=False)
    return console.file.getvalue().splitlines()


def test_a_row_takes_one_line():
    rows = [
        _wide_row("float", method="float"),
        _wide_row("per_channel", gate="outside", accepted=False),
        _wide_row("uneven", gate="undecided", accepted=False, num_images_to_decide=123456),
        _wide_row("qat", method="qat", kept_start=True, winner=True),
    ]
    lines = _shown(result_table(rows))
    assert len(lines) == len(rows) + 4  # Two borders, the header and its rule.
    assert all(
        word in line for word, line in zip(("baseline", "outside", "undecided", "winner"), lines[3:], strict=False)
    )
    assert "qat (start)" in lines[6]


def test_a_long_name_is_folded_between_its_words_and_not_where_there_is_room():
    rows = [_wide_row("search-4-per_channel"), _wide_row("search-12-qat", method="qat", kept_start=True)]
    lines = [line.split("  ")[0].strip() for line in _shown(result_table(rows))[3:-1]]
    assert lines == ["search-4-per_", "channel", "search-12-qat", "(start)"]
    console = Console(file=io.StringIO(), width=100)
    console.print(result_table(rows, 100))
    assert "search-4-per_channel" in console.file.getvalue()


def test_a_name_without_words_is_folded_anywhere():
    (first, *_, last) = _shown(result_table([_wide_row("x" * 40)]))[3:-1]
    assert (first.split()[0], last.strip()) == ("x" * 15, "x" * 10)


def test_the_best_of_a_run_without_winner_has_lost_points_as_a_winner_has():
    rows = (variant_row("float", method="float"), variant_row("a", top1_drop=0.04, accepted=False))
    assert "The best so far: a in torchscript-x86, -4.00 points" in conclusion(_report(*rows), 0.01)
    won = (rows[0], variant_row("a", top1_drop=0.04, winner=True, reason="the fastest inside the gate"))
    assert "Winner: a in torchscript-x86, -4.00 points" in conclusion(_report(*won), 0.05)


def test_the_conclusion_says_why_how_sure_it_is_what_is_doubtful_and_how_to_load_the_file():
    best = variant_row(
        "a",
        winner=True,
        runtime="openvino",
        artifact_path="/models/a.onnx",
        top1_drop=0.004,
        top1_drop_low=-0.002,
        top1_drop_high=0.01,
        p_value=0.25,
        reason="as fast as b (within noise), as accurate, smallest",
        latency_p50_ms=2.5,
        speedup=3.0,
    )
    doubt = NoteRow(kind="warning", text="Few images.")
    lines = conclusion(replace(_report(variant_row("float", method="float"), best), notes=(doubt,)), 0.01).splitlines()
    assert lines == [
        "Winner: a in openvino, -0.40 points of top-1 against float (95% interval -1.00 to +0.20, p = 0.25), 3.00x as "
        "fast.",
        "Why: as fast as b (within noise), as accurate, smallest.",
        "Warning: Few images.",
        "  file    /models/a.onnx",
        '  load    quantlib.api.load("/models/a.onnx", "openvino")',
        "          75.00% of top-1, 2.50 ms per image on one thread, 4.00 MB",
    ]


def test_intervals_and_p_values_are_shown_on_request():
    row = variant_row("a", top1_drop=0.004, top1_drop_low=-0.002, top1_drop_high=0.01, p_value=0.25, num_images=5000)
    lines = _shown(interval_table([variant_row("float", method="float"), row]))
    assert [line.split() for line in lines if " a " in line] == [
        ["a", "-0.40", "-1.00", "to", "+0.20", "0.25", "5,000"]
    ]


def test_nothing_is_said_about_causes_that_were_not_measured():
    assert why(diagnose(_report(variant_row("float", method="float"), variant_row("a")))) == []


def test_weights_and_activations_are_told_apart():
    row = variant_row("a", top1=0.8332, top1_simulated=0.7, top1_weights_only=0.71, top1_activations_only=0.82)
    line = next(line for line in _shown(*why(diagnose(_report(row)))) if " a " in line)
    assert [word for word in line.split() if "%" in word] == ["71.00%", "82.00%", "70.00%", "83.32%"]


def test_the_three_layers_that_cost_most_are_shown_with_what_to_try():
    row = variant_row("a", top1_drop=0.25, weights="per_channel", observer="mse", equalized=True, bias_corrected=True)
    layers = tuple(layer_row(f"features.{n}.conv.0.0", divergence_only=0.1 * n) for n in range(5))
    lines = _shown(*why(diagnose(_report(row, layers=layers))))
    shown = [line.split()[1] for line in lines if "ConvReLU2d" in line or "dB" in line]
    assert shown == [f"features.{n}.conv.0.0" for n in (4, 3, 2)]
    assert "256 training images held out" in lines[0]
    assert lines[1].strip() == "top-1 87.50% in float, 25.00% with all layers int8"
    assert any('float_layers = ["features.4.conv.0.0"' in line for line in lines)


def _run(run_id, state, stage):
    started = datetime.now(UTC).isoformat()
    file = RunFile(run_id=run_id, flow="quantize", recipe={}, started_at=started, host="h", pid=1, flow_run_id=None)
    return RunStatus(file=file, state=state, num_stages=1234, stage=stage, keys=frozenset(), message="")


def test_a_list_of_runs_takes_one_line_per_run_and_cuts_only_the_last_stage():
    names = ("20261127-005823-accuracy-d7ea7698", "20261127-005824-a-d7ea7699")
    runs = [_run(name, "completed", "simulate-accurate_7_bits-activations_only [red]") for name in names]
    lines = _shown(runs_table(runs))[3:-1]
    assert [line.split()[:6] for line in lines] == [[name, "completed", "0", "s", "1234", "report"] for name in names]
    assert all("simulate" in line for line in lines)
