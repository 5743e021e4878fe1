"""Made-up rows of a report: tests set what matters to them, and the rest is here."""

from datetime import UTC, datetime
from typing import Any

from quantlib.report.rows import FileRow, LayerRow, VariantRow

START = datetime(2026, 5, 1, 3, 0, tzinfo=UTC)


def variant_row(name: str, **changes: Any) -> VariantRow:
    """A PTQ variant that is accepted but not the winner; the float model if `method="float"`."""
    values: dict[str, Any] = {
        "recipe": "tiny",
        "variant": name,
        "method": "ptq",
        "qconfig": "accurate",
        "engine": "x86",
        "top1": 0.75,
        "top5": 1.0,
        "loss": 0.5,
        "num_images": 4,
        "top1_drop": 0.0,
        "top1_selection": 0.8,
        "selected_on": "held_out",
        "top1_simulated": None,
        "top1_weights_only": None,
        "top1_activations_only": None,
        "best_epoch": None,
        "size_bytes": 4_000_000,
        "latency_p50_ms": 8.0,
        "speedup": 1.0,
        "accepted": True,
        "winner": False,
        "runtime": "torchscript-x86",
        "artifact_sha256": f"hash of {name}",
        "artifact_path": f"/models/{name}.pt",
        "torch_version": "2.15.0",
        "cpu_model": "A CPU",
        "created_at": START,
    }
    if changes.get("method") == "float":
        values |= {"qconfig": None, "engine": None, "runtime": "torchscript"}
    return VariantRow(**values | changes)


def layer_row(name: str, **changes: Any) -> LayerRow:
    """A layer of the variant "a"."""
    values: dict[str, Any] = {
        "variant": "a",
        "layer": name,
        "type": "ConvReLU2d",
        "weight_min": -1.0,
        "weight_max": 1.0,
        "activation_min": 0.0,
        "activation_max": 6.0,
        "sqnr_db": 21.5,
        "saturation": 0.0002,
        "top1_float": 0.875,
        "top1_int8": 0.25,
        "top1_only": 0.75,
        "top1_all_but": 0.5,
        "divergence_only": 0.01,
        "num_images": 256,
        "measured_on": "held_out",
    }
    return LayerRow(**values | changes)


def file_row(name: str, **changes: Any) -> FileRow:
    """The ONNX file of a variant, inside the gate."""
    values: dict[str, Any] = {
        "variant": name,
        "path": f"/models/{name}.onnx",
        "sha256": f"hash of {name}.onnx",
        "size_bytes": 4_000_000,
        "runtime": "openvino",
        "top1": 0.75,
        "top1_drop": 0.0,
        "top1_drop_low": -0.01,
        "top1_drop_high": 0.01,
        "p_value": 1.0,
        "top1_selection": 0.8,
        "latency_p50_ms": 8.0,
        "speedup": 1.0,
        "gate": "inside",
        "num_images_to_decide": None,
        "reported": True,
    }
    return FileRow(**values | changes)
