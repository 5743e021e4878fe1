"""The check of an exported file: it must answer as its model does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from quantlib import helper, temporary
from quantlib.data import shards
from quantlib.errors import ModelError
from quantlib.quantize.grids import Grid
from quantlib.recipe.interface import FLOAT, Interface
from quantlib.runtimes import available

# About 0.001 for accurate int8 models, 0.05 for bad ones: each rounding difference grows on its way through.
_MAX_ERROR = 0.1
_MAX_FLOAT_ERROR = 1e-4


def answers_of(model: nn.Module, shard: Path) -> Tensor:
    """A model's logits for the images of a shard that a file must answer, [n, num_classes] float32."""
    with torch.inference_mode():
        answers: Tensor = model.eval()(shards.open_shard(shard).inputs(stop=helper.NUM_CHECKED))
    return answers


def check_file(
    content: bytes,
    model: nn.Module,
    runtime: str,
    shard: Path,
    interface: Interface = FLOAT,
    expected: Tensor | None = None,
) -> None:
    """Compare an exported file's logits, computed in a helper process, with the model's own, on real images.

    They are not bit-identical: runtimes round sums in different places, and int8 models amplify that.

    Args:
        content: The file.
        model: Fused float, or quantized.
        runtime: The runtime that the file runs in.
        shard: A file of decoded images; the first 32 are used.
        interface: What the file takes and gives.
        expected: What `answers_of` returns, if it is known.

    Raises:
        ModelError: If the file does not run, crashes or hangs; or if the difference has more than a tenth of the
            logits' power, or for float a ten-thousandth: a wrong scale, zero point or layer causes more than all of it.
        MachineError: If this machine lacks the runtime or the engine, or the helper was ended from outside.
    """
    with temporary.new_folder() as folder:
        path = folder / f"model{available.suffix_of(runtime)}"
        path.write_bytes(content)
        got = helper.run_file(path, runtime, shard, helper.NUM_CHECKED, interface)
    if expected is None:
        expected = answers_of(model, shard)
    if interface.softmax:
        expected = expected.softmax(dim=1)
    error = float((got - expected).square().sum() / expected.square().sum().clamp_min(torch.finfo().tiny))
    grids = [module for module in model.modules() if isinstance(module, Grid)]
    allowed = _MAX_ERROR if grids else _MAX_FLOAT_ERROR
    if not error <= allowed:
        has_8_bits = any(grid.quant_max == 255 for grid in grids)
        advice = " On a CPU whose int8 arithmetic saturates, set activation_bits = 7." if has_8_bits else ""
        raise ModelError(
            f"In {runtime} the logits are {error:.2%} of their power away from the model's own, but at most "
            f"{allowed:.2%} are allowed.{advice}"
        )
