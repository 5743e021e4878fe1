"""What a terminal of 80 columns shows."""

import io
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from flows.console import result_table, why
from quantlib.diagnosis import diagnose
from quantlib.report import LayerRow, Report, VariantRow


def _variant(name: str, **changes: Any) -> VariantRow:
    values: dict[str, Any] = {"recipe": "r", "variant": name, "method": "ptq", "qconfig": "accurate", "engine": "x86"}
    values |= {"top1": 0.8332, "top5": 1.0, "loss": 0.7, "num_images": 4, "top1_drop": 0.5184, "top1_selection": 0.5}
    values |= {"selected_on": "held_back", "top1_simulated": None, "top1_weights_only": None}
    values |= {"top1_activations_only": None, "best_epoch": None, "size_bytes": 8918000, "latency_p50_ms": 12.34}
    values |= {"speedup": 2.5, "accepted": True, "winner": False, "artifact_sha256": "", "artifact_path": ""}
    values |= {"torch_version": "", "cpu_model": "", "created_at": datetime.now(UTC)}
    return VariantRow(**values | changes)


def _report(*variants: VariantRow, layers: tuple[LayerRow, ...] = ()) -> Report:
    return Report(run_id="r", variants=variants, epochs=(), latency=(), stages=(), layers=layers)


def _layer(name: str, divergence: float) -> LayerRow:
    return LayerRow(
        variant="a",
        layer=name,
        type="ConvReLU2d",
        weight_min=-1.0,
        weight_max=1.0,
        activation_min=0.0,
        activation_max=6.0,
        sqnr_db=21.5,
        saturation=0.0002,
        top1_only=0.75,
        top1_all_but=0.5,
        divergence_only=divergence,
        num_images=256,
        measured_on="held_back",
    )


def _shown(*parts: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    for part in parts:
        console.print(part, highlight=False, markup=False)
    return console.file.getvalue().splitlines()


def test_a_row_takes_one_line() -> None:
    rows = [
        _variant("float", method="float"),
        _variant("per_channel", gate="outside", accepted=False),
        _variant("uneven", gate="undecided", accepted=False, num_images_to_decide=123456),
        _variant("qat", method="qat", kept_start=True, winner=True),
    ]
    lines = _shown(result_table(rows))
    assert len(lines) == len(rows) + 4  # Two borders, the header and its line.
    assert all(
        word in line for word, line in zip(("baseline", "outside", "undecided", "winner"), lines[3:], strict=False)
    )
    assert "qat (start)" in lines[6]


def test_nothing_is_said_of_causes_that_were_not_measured() -> None:
    assert why(diagnose(_report(_variant("float", method="float"), _variant("a")))) == []


def test_weights_and_activations_are_told_apart() -> None:
    row = _variant("a", top1_simulated=0.7, top1_weights_only=0.71, top1_activations_only=0.82)
    line = next(line for line in _shown(*why(diagnose(_report(row)))) if " a " in line)
    assert [word for word in line.split() if "%" in word] == ["71.00%", "82.00%", "70.00%", "83.32%"]


def test_the_three_layers_that_cost_most_are_shown_with_what_to_try() -> None:
    row = _variant("a", weights="per_channel", observer="mse", equalized=True, bias_corrected=True)
    layers = tuple(_layer(f"features.{n}.conv.0.0", 0.1 * n) for n in range(5))
    lines = _shown(*why(diagnose(_report(row, layers=layers))))
    shown = [line.split()[1] for line in lines if "ConvReLU2d" in line or "dB" in line]
    assert shown == [f"features.{n}.conv.0.0" for n in (4, 3, 2)]
    assert "256 training images held back" in lines[0]
    assert any('float_layers = ["features.4.conv.0.0"' in line for line in lines)
