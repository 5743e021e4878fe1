"""Exports a TorchScript file to ONNX, and checks that both give the same answers."""

import io
from pathlib import Path
from typing import Any, cast

import torch

from quantlib import temporary
from quantlib.data import shards
from quantlib.errors import ModelError
from quantlib.runtimes import available, classifiers
from quantlib.runtimes.engine import use_engine

# The newest opset that torch's exporter of quantized operations was tried with.
_OPSET = 17


_NUM_CHECKED = 32


# About 0.001 for accurate int8 models, 0.05 for bad ones: each rounding difference grows on its way through.
_MAX_ERROR = 0.1


_MAX_FLOAT_ERROR = 1e-4


def to_onnx(torchscript: Path, engine: str | None, input_shape: tuple[int, int, int]) -> bytes:
    """Export a TorchScript file to ONNX, for any number of images; int8 as QuantizeLinear and DequantizeLinear.

    The same model gives the same bytes.

    Args:
        torchscript: Made by `script`.
        engine: The engine whose packed weights are unpacked; None: float.
        input_shape: Channels, height and width of the model's input.

    Raises:
        ModelError: If it has an operation that ONNX cannot express.
    """
    buffer = io.BytesIO()
    try:
        with use_engine(engine or "auto"), torch.inference_mode():
            torch.onnx.export(
                torch.jit.load(str(torchscript), map_location="cpu").eval(),
                (torch.zeros(1, *input_shape),),
                cast("Any", buffer),  # It accepts a buffer; only its annotation does not.
                opset_version=_OPSET,
                dynamo=False,  # The newer exporter cannot express eager mode's quantized operations.
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            )
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"The model cannot be written as ONNX: {str(error).splitlines()[0]}") from None
    return buffer.getvalue()


def check_onnx(content: bytes, torchscript: Path, engine: str | None, runtime: str, shard: Path) -> None:
    """Compare an ONNX file's logits with those of the TorchScript file it was made from, on real images.

    They are not bit-identical: runtimes round sums in different places, and int8 models amplify that.

    Args:
        content: The ONNX file.
        torchscript: The TorchScript file.
        engine: The engine that the TorchScript file runs on; None: float.
        runtime: The runtime that the ONNX file runs in.
        shard: A file of decoded images; the first 32 are used.

    Raises:
        ModelError: If the difference has more than a tenth of the logits' power, or for float a ten-thousandth; a
            wrong scale, zero point or layer causes more than all of it.
    """
    x = shards.open_shard(shard).inputs(stop=_NUM_CHECKED)
    with temporary.new_folder() as folder:
        (folder / "model.onnx").write_bytes(content)
        got = classifiers.open_model(folder / "model.onnx", runtime)(x)
    expected = classifiers.open_model(torchscript, available.torchscript_on(engine))(x)
    error = float((got - expected).square().sum() / expected.square().sum().clamp_min(torch.finfo().tiny))
    allowed = _MAX_FLOAT_ERROR if engine is None else _MAX_ERROR
    if not error <= allowed:
        advice = "" if engine is None else " On a CPU whose int8 arithmetic saturates, set activation_bits = 7."
        raise ModelError(
            f"In {runtime} the logits are {error:.2%} of their power away from those of TorchScript, but at most "
            f"{allowed:.2%} are allowed.{advice}"
        )
