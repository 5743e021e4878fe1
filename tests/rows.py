"""Made-up rows of a report: tests set what matters to them, and the rest is here."""

from datetime import UTC, datetime
from typing import Any

from quantlib.export.bundle import FileInfo, ModelInfo, Preprocessing
from quantlib.report.layers import LayerRow
from quantlib.report.rows import FileRow, VariantRow

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


def preprocessing(**changes: Any) -> Preprocessing:
    """ImageNet's usual one."""
    values: dict[str, Any] = {
        "channel_order": "RGB",
        "resize": [256],
        "crop": [224, 224],
        "interpolation": "bilinear",
        "antialias": True,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    return Preprocessing(**values | changes)


def model_info(*files: FileInfo, **changes: Any) -> ModelInfo:
    """The document of a variant "small"; of its ONNX file, if none are given."""
    values: dict[str, Any] = {
        "schema_version": 1,
        "run_id": "20260501-030000-tiny-0000000a",
        "variant": "small",
        "method": "ptq",
        "recipe": {"name": "tiny", "data": {"format": "imagefolder", "root": "flowers"}},
        "classes": ["blue", "green", "red"],
        "input_size": [3, 224, 224],
        "preprocessing": preprocessing(),
        "float_accuracy": {"top1": 0.8, "top1_low": 0.75, "top1_high": 0.84, "num_images": 250},
        "files": list(files) or [file_info()],
        "cpu_model": "A CPU",
        "torch_version": "2.15.0",
        "quantflow_version": "0.1.0",
    }
    return ModelInfo(**values | changes)


def file_info(**changes: Any) -> FileInfo:
    """The winner."""
    values: dict[str, Any] = {
        "name": "small.onnx",
        "runtime": "onnxruntime",
        "runtime_version": "1.32.0",
        "weights_sha256": "ab" * 32,
        "verdict": "winner",
        "measured": {
            "accuracy": {"top1": 0.796, "top1_low": 0.742, "top1_high": 0.841, "num_images": 250},
            "top1_drop": 0.004,
            "top1_drop_low": -0.008,
            "top1_drop_high": 0.016,
            "latency_p50_ms": 1.25,
        },
    }
    return FileInfo(**values | changes)
