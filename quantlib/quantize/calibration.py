"""Calibration: observers in, training images through, activation ranges out."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlib.data import shards
from quantlib.eager.modules import ObserverBase
from quantlib.graph import fusion
from quantlib.models import checkpoint
from quantlib.progress import Progress, silent
from quantlib.quantize import preparation
from quantlib.quantize.observers import ActivationStatistics
from quantlib.recipe.scheme import Scheme


def calibrate(prepared: nn.Module, shard: Path, batch_size: int, progress: Progress = silent) -> None:
    """Show the images of a shard to a model's observers, in place.

    Args:
        prepared: With observers, which go on from what they have seen before.
        shard: A file of decoded images.
        batch_size: Images a forward pass.
        progress: Called with (images done, images in all).
    """
    total, done = shards.count(shard), 0
    with torch.inference_mode():
        for x, _ in shards.batches(shard, batch_size):
            prepared(x)
            done += len(x)
            progress(done, total)


def load_or_observe(content: bytes, float_layers: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """A model that collects statistics of its activations, and its header: as it was stored, or from a fused model."""
    header, state = checkpoint.open_saved(content)
    if "observed" not in header:
        fused, header = fusion.load(content)
        return preparation.observe(fused, float_layers), header | {"observed": list(float_layers)}
    observed = preparation.observe(fusion.rebuild(header), float_layers)
    observed.load_state_dict(state)
    return observed, header


def choose_ranges(content: bytes, scheme: Scheme) -> bytes:
    """A stored observed model as a calibrated one, as `load_prepared` reads it.

    Args:
        content: With statistics, collected with the scheme's `float_layers`.
        scheme: Its observer chooses the ranges.
    """
    observed, header = load_or_observe(content, scheme.float_layers)
    prepared = preparation.rebuild(header, scheme)
    for path, module in prepared.named_modules():
        if isinstance(module, ObserverBase):
            statistics = observed.get_submodule(path)
            assert isinstance(statistics, ActivationStatistics)
            statistics.hand_over(module)
    weights = {name: value for name, value in observed.state_dict().items() if ".activation_post_process." not in name}
    prepared.load_state_dict(weights, strict=False)
    del header["observed"]
    return checkpoint.hand_over(prepared, header | {"scheme": asdict(scheme)})


def load_or_prepare(content: bytes, scheme: Scheme) -> tuple[nn.Module, dict[str, Any]]:
    """A prepared model and its header: as it was stored, or made from a fused model as the scheme says."""
    header, state = checkpoint.open_saved(content)
    if "scheme" in header:
        return _prepared(header, state), header
    fused, header = fusion.load(content)
    return preparation.prepare(fused, scheme, header["fused"]), header | {"scheme": asdict(scheme)}


def load_prepared(content: bytes) -> tuple[nn.Module, dict[str, Any]]:
    """A prepared model (PTQ: calibrated; QAT: an epoch's state) and its header, as `checkpoint.save` made it."""
    if taken := checkpoint.take(content):
        return taken
    header, state = checkpoint.open_saved(content)
    return _prepared(header, state), header


def _prepared(header: dict[str, Any], state: dict[str, Any]) -> nn.Module:
    prepared = preparation.rebuild(header, Scheme.from_header(header))
    prepared.load_state_dict(state)
    return prepared
