"""Calibration: observers in, training images through, activation ranges out."""

from pathlib import Path

import torch
from torch import nn

from quantlib.data import shards
from quantlib.eager.modules import ObserverBase
from quantlib.progress import Progress, silent
from quantlib.quantize.observers import ActivationStatistics


def calibrate(prepared: nn.Module, shard: Path, batch_size: int, progress: Progress = silent) -> None:
    """Run a shard's images through a model for its observers to see, in place.

    Args:
        prepared: With observers, which continue from what they have already seen.
        shard: A file of decoded images.
        batch_size: Images per forward pass.
        progress: Called with (images done, images in all).
    """
    total, done = shards.count(shard), 0
    with torch.inference_mode():
        for x, _ in shards.batches(shard, batch_size):
            prepared(x)
            done += len(x)
            progress(done, total)


def choose_ranges(observed: nn.Module, prepared: nn.Module) -> None:
    """Give a model, in place, an observed one's weights and the ranges its own observers choose from the statistics.

    Args:
        observed: Made by `preparation.observe`; it has seen the calibration images.
        prepared: Made by `preparation.prepare` in mode "eval", with the same `float_layers`.
    """
    for path, module in prepared.named_modules():
        if isinstance(module, ObserverBase):
            statistics = observed.get_submodule(path)
            assert isinstance(statistics, ActivationStatistics)
            statistics.hand_over(module)
    weights = {name: value for name, value in observed.state_dict().items() if ".activation_post_process." not in name}
    prepared.load_state_dict(weights, strict=False)
