"""Images decoded once: shards of uint8 pixels and labels that every evaluation maps into memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from quantlib.data.normalization import Normalization


@dataclass(frozen=True)
class Shard:
    """Decoded images, mapped from a file and not read."""

    pixels: Tensor
    """[N, H, W, C] uint8."""
    labels: Tensor
    """[N] int64."""
    normalization: Normalization

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Some of the images as a model's input, [n, C, H, W] float32."""
        return to_input(self.pixels[start:stop], self.normalization)


def save(pixels: Iterable[np.ndarray], labels: np.ndarray, normalization: Normalization, file: IO[bytes]) -> None:
    """Write a shard: three arrays in NumPy's own format, one after the other.

    Args:
        pixels: uint8: [N, H, W, C] as one array, or in parts [n, H, W, C] that are written as they come.
        labels: [N], int64 class indices.
        normalization: How these pixels become a model's input.
        file: Open for writing.
    """
    npy.write_array(file, labels, allow_pickle=False)
    npy.write_array(file, np.array([normalization.mean, normalization.std]), allow_pickle=False)
    for number, part in enumerate(pixels):
        if number == 0:
            shape = (len(labels), *part.shape[-3:])
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(np.ascontiguousarray(part).data)


def open_shard(path: Path) -> Shard:
    """Open what `save` wrote."""
    with path.open("rb") as file:
        labels = npy.read_array(file, allow_pickle=False)
        mean, std = npy.read_array(file, allow_pickle=False).tolist()
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        # Copy-on-write, as torch does not support read-only arrays.
        pixels = np.memmap(file, dtype, mode="c", offset=file.tell(), shape=shape)
    return Shard(torch.from_numpy(pixels), torch.from_numpy(labels), Normalization(tuple(mean), tuple(std)))


def to_input(pixels: Tensor, normalization: Normalization) -> Tensor:
    """Pixels [N, H, W, C] uint8 to a model's input [N, C, H, W] float32, normalized, channels last in memory.

    The same arithmetic as torchvision's ToTensor and Normalize, so the same bits.
    """
    number, height, width, channels = pixels.shape
    # One image row at a time: vectors of three channels would be too short for the CPU's vector units.
    mean, std = (torch.tensor(value).repeat(width) for value in (normalization.mean, normalization.std))  # (C W,)
    rows = pixels.reshape(number * height, width * channels).to(torch.float32)
    return rows.div_(255).sub_(mean).div_(std).view(number, height, width, channels).permute(0, 3, 1, 2)


def batches(path: Path, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [n, C, H, W] and labels [n] of a shard, in order; n is `batch_size`, except for the rest at the end."""
    shard = open_shard(path)
    for start in range(0, len(shard), batch_size):
        yield shard.inputs(start, start + batch_size), shard.labels[start : start + batch_size]


def count(path: Path) -> int:
    """Number of images in a shard."""
    return len(open_shard(path))
