"""What a terminal of 80 columns shows."""

import io
from typing import Any

from rich.console import Console
from rows import layer_row, variant_row

from flows.console import conclusion, result_table, why
from quantlib.diagnosis import diagnose
from quantlib.report import LayerRow, Report, VariantRow


def _wide_row(name: str, **changes: Any) -> VariantRow:
    """With figures as long as real ones get."""
    wide = {"top1_drop": 0.5184, "size_bytes": 8_918_000, "latency_p50_ms": 12.34}
    return variant_row(name, **wide | changes)


def _report(*variants: VariantRow, layers: tuple[LayerRow, ...] = ()) -> Report:
    return Report(run_id="r", variants=variants, epochs=(), latency=(), stages=(), layers=layers)


def _shown(*parts: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part, highlight=False, markup=False)
    return console.file.getvalue().splitlines()


def test_a_row_takes_one_line() -> None:
    rows = [
        _wide_row("float", method="float"),
        _wide_row("per_channel", gate="outside", accepted=False),
        _wide_row("uneven", gate="undecided", accepted=False, num_images_to_decide=123456),
        _wide_row("qat", method="qat", kept_start=True, winner=True),
    ]
    lines = _shown(result_table(rows))
    assert len(lines) == len(rows) + 4  # Two borders, the header and its line.
    assert all(
        word in line for word, line in zip(("baseline", "outside", "undecided", "winner"), lines[3:], strict=False)
    )
    assert "qat (start)" in lines[6]


def test_the_best_of_a_run_without_winner_has_lost_points_as_a_winner_has() -> None:
    rows = (variant_row("float", method="float"), variant_row("a", top1_drop=0.04, accepted=False))
    assert "The best so far is a, -4.00 points." in conclusion(_report(*rows), 0.01)
    won = (rows[0], variant_row("a", top1_drop=0.04, winner=True))
    assert "Winner: a, -4.00 points" in conclusion(_report(*won), 0.05)


def test_nothing_is_said_of_causes_that_were_not_measured() -> None:
    assert why(diagnose(_report(variant_row("float", method="float"), variant_row("a")))) == []


def test_weights_and_activations_are_told_apart() -> None:
    row = variant_row("a", top1=0.8332, top1_simulated=0.7, top1_weights_only=0.71, top1_activations_only=0.82)
    line = next(line for line in _shown(*why(diagnose(_report(row)))) if " a " in line)
    assert [word for word in line.split() if "%" in word] == ["71.00%", "82.00%", "70.00%", "83.32%"]


def test_the_three_layers_that_cost_most_are_shown_with_what_to_try() -> None:
    row = variant_row("a", top1_drop=0.25, weights="per_channel", observer="mse", equalized=True, bias_corrected=True)
    layers = tuple(layer_row(f"features.{n}.conv.0.0", divergence_only=0.1 * n) for n in range(5))
    lines = _shown(*why(diagnose(_report(row, layers=layers))))
    shown = [line.split()[1] for line in lines if "ConvReLU2d" in line or "dB" in line]
    assert shown == [f"features.{n}.conv.0.0" for n in (4, 3, 2)]
    assert "256 training images held back" in lines[0]
    assert lines[1].strip() == "top-1 87.50% in float, 25.00% with all layers int8"
    assert any('float_layers = ["features.4.conv.0.0"' in line for line in lines)
