"""A model as ONNX, written from its weights and grids, and whether it answers as the TorchScript file does."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from quantlib import temporary
from quantlib.data import shards
from quantlib.eager.twin import float_twin
from quantlib.errors import ModelError
from quantlib.graph.tracing import untraced
from quantlib.runtimes import available, classifiers

# The newest opset that torch's legacy exporter writes.
_OPSET = 17


_NUM_CHECKED = 32


# About 0.001 for accurate int8 models, 0.05 for bad ones: each rounding difference grows on its way through.
_MAX_ERROR = 0.1


_MAX_FLOAT_ERROR = 1e-4


def to_onnx(model: nn.Module, input_shape: tuple[int, int, int]) -> bytes:
    """Write a model as ONNX, for any number of images; int8 as QuantizeLinear and DequantizeLinear.

    The same model gives the same bytes.

    Args:
        model: Fused float, or int8.
        input_shape: Channels, height and width of its input.

    Raises:
        ModelError: If it has an operation that ONNX cannot express.
    """
    import onnx

    if whole := untraced(model):
        raise ModelError(
            f"The model cannot be written as ONNX: {whole[0]} branches on values, and the file would hold one branch."
        )
    twin, weights = float_twin(model)
    buffer = io.BytesIO()
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        # ONNX has no operation for attention that is fused for inference.
        torch.backends.mha.set_fastpath_enabled(False)
        # torch reads this flag without calling it, finds it true, and prints the whole graph where the export fails.
        with torch.inference_mode(), patch.object(torch._C, "_jit_is_onnx_log_enabled", None):
            torch.onnx.export(
                twin,
                (torch.zeros(1, *input_shape),),
                cast("Any", buffer),  # It accepts a buffer; only its annotation does not.
                opset_version=_OPSET,
                dynamo=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            )
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"The model cannot be written as ONNX: {str(error).splitlines()[0]}") from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    written = onnx.load_from_string(buffer.getvalue())
    _store_as_int8(written.graph, weights)
    content: bytes = written.SerializeToString(deterministic=True)
    return content


def _store_as_int8(graph: Any, weights: Sequence[Tensor]) -> None:
    """Replace float weights that lie on a grid by their int8 values and a DequantizeLinear, in place.

    Args:
        graph: ONNX's GraphProto.
        weights: Quantized tensors [out, ...].
    """
    from onnx import helper, numpy_helper

    # By value: a layer over tokens is written as MatMul with its weight transposed, under a new name.
    known = {}
    for weight in weights:
        values = weight.dequantize().numpy()
        known[values.shape, values.tobytes()] = (weight, 0)
        if values.ndim == 2:
            known[values.T.shape, np.ascontiguousarray(values.T).tobytes()] = (weight, 1)
    dequantized = []
    for initializer in list(graph.initializer):
        values = numpy_helper.to_array(initializer)
        found = known.get((values.shape, values.tobytes()))
        if found is None:
            continue
        weight, axis = found
        name = initializer.name
        stored = weight.int_repr().numpy()
        scale, zero_point = _grid_of(weight)
        graph.initializer.remove(initializer)
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.ascontiguousarray(stored.T) if axis else stored, f"{name}_int8"),
                numpy_helper.from_array(scale, f"{name}_scale"),
                numpy_helper.from_array(zero_point, f"{name}_zero_point"),
            ]
        )
        inputs = [f"{name}_int8", f"{name}_scale", f"{name}_zero_point"]
        per_channel: dict[str, Any] = {"axis": axis} if scale.ndim else {}
        dequantized.append(helper.make_node("DequantizeLinear", inputs, [name], f"{name}_dequantize", **per_channel))
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*dequantized, *others])


def _grid_of(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point: of each output channel [out], or one []."""
    if weight.qscheme() in {torch.per_channel_affine, torch.per_channel_symmetric}:
        scale, zero_point = weight.q_per_channel_scales().numpy(), weight.q_per_channel_zero_points().numpy()
    else:
        scale, zero_point = np.array(weight.q_scale()), np.array(weight.q_zero_point())
    return scale.astype(np.float32), zero_point.astype(np.int8)


def check_onnx(content: bytes, torchscript: Path, engine: str | None, runtime: str, shard: Path) -> None:
    """Compare an ONNX file's logits with those of the TorchScript file of the same model, on real images.

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
