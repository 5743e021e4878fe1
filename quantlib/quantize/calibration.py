"""Calibration: observers in, training images through, activation ranges out."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from quantlib.data import shards
from quantlib.progress import Progress, silent
from quantlib.quantize.preparation import quantizers
from quantlib.quantize.ranges import find_grid
from quantlib.recipe.scheme import Scheme

# 1,024 images of 64 x 64, 83 of 224 x 224: where every layer's output for all images is in memory at once, and where a
# few are enough, as float and int8 see the same ones.
_MAX_PIXELS = 2**22


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


def first_images(batches: Iterable[Tensor]) -> Tensor:
    """The first images of batches [N, C, H, W], 2**22 pixels in all, for what needs no more."""
    chosen: list[Tensor] = []
    for batch in batches:
        most = max(1, _MAX_PIXELS // batch[0, 0].numel()) - sum(map(len, chosen))
        chosen.append(batch[:most])
        if most <= len(batch):
            break
    return torch.cat(chosen)


def first_images_of(paths: Sequence[Path]) -> Tensor:
    """`first_images` of files of decoded images."""
    return first_images(_batches_of(paths))


def _batches_of(paths: Sequence[Path]) -> Iterator[Tensor]:
    for path in paths:
        shard = shards.open_shard(path)
        _, height, width, _ = shard.pixels.shape
        yield shard.inputs(stop=max(1, _MAX_PIXELS // (height * width)))
