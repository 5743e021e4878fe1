"""Images decoded once: shards of uint8 pixels and labels that every evaluation maps into memory."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

# ImageNet's channel means and deviations, which every torchvision model is trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def save(pixels: Iterable[np.ndarray], labels: np.ndarray, file: IO[bytes]) -> None:
    """Write a shard: two arrays in NumPy's own format, one after the other.

    Args:
        pixels: uint8, RGB: [N, H, W, 3] as one array, or in parts [n, H, W, 3] that are written as they come.
        labels: [N], int64 class indices.
        file: Open for writing.
    """
    npy.write_array(file, labels, allow_pickle=False)
    for number, part in enumerate(pixels):
        if number == 0:
            shape = (len(labels), *part.shape[-3:])
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(np.ascontiguousarray(part).data)


def open_shard(path: Path) -> tuple[Tensor, Tensor]:
    """A shard's pixels [N, H, W, 3] uint8 and labels [N] int64; pixels are mapped, not read."""
    with path.open("rb") as file:
        labels = npy.read_array(file, allow_pickle=False)
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        # Copy-on-write, as torch does not support read-only arrays.
        pixels = np.memmap(file, dtype, mode="c", offset=file.tell(), shape=shape)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def to_input(pixels: Tensor) -> Tensor:
    """Pixels [N, H, W, 3] uint8 to a model's input [N, 3, H, W] float32, normalized, channels last in memory.

    The same arithmetic as torchvision's ToTensor and Normalize, so the same bits.
    """
    number, height, width, _ = pixels.shape
    # One image row at a time: vectors of three channels would be too short for the CPU's vector units.
    mean, std = (torch.tensor(value).repeat(width) for value in (MEAN, STD))  # (3 W,)
    rows = pixels.reshape(number * height, width * 3).to(torch.float32)
    return rows.div_(255).sub_(mean).div_(std).view(number, height, width, 3).permute(0, 3, 1, 2)


def batches(path: Path, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [n, 3, H, W] and labels [n] of a shard, in order; n is `batch_size`, except for the rest at the end."""
    pixels, labels = open_shard(path)
    for start in range(0, len(labels), batch_size):
        yield to_input(pixels[start : start + batch_size]), labels[start : start + batch_size]


def count(path: Path) -> int:
    """Number of images in a shard."""
    return len(open_shard(path)[1])
