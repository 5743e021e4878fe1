"""Calibration: observers in, training images through, activation ranges out."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, fx

from quantlib.data import shards
from quantlib.progress import Progress, silent
from quantlib.quantize.preparation import quantizers
from quantlib.quantize.ranges import find_grid
from quantlib.recipe.scheme import Scheme


def calibrate(observed: fx.GraphModule, shard: Path, batch_size: int, progress: Progress = silent) -> None:
    """Run a shard's images through a model for its observers to see, in place.

    Args:
        observed: Made by `preparation.observe`; its observers continue from what they have already seen.
        shard: A file of decoded images.
        batch_size: Images per forward pass.
        progress: Called with (images done, images in all).
    """
    show(observed, (x for x, _ in shards.batches(shard, batch_size)), shards.count(shard), progress)


def show(observed: fx.GraphModule, batches: Iterable[Tensor], total: int, progress: Progress = silent) -> None:
    """Run batches [N, C, H, W] of images, `total` images in all, through a model for its observers to see."""
    done = 0
    with torch.inference_mode():
        for x in batches:
            observed(x)
            done += len(x)
            progress(done, total)


def choose_ranges(observed: fx.GraphModule, scheme: Scheme) -> None:
    """Replace a model's observers, in place, by the grids that the scheme chooses from what they have seen.

    Args:
        observed: It has seen the calibration images, with the scheme's `float_layers` in float.
        scheme: Its observer and number of bits.
    """
    for path, statistics in quantizers(observed).items():
        observed.set_submodule(path, find_grid(statistics, scheme.observer, scheme.activation_bits))
