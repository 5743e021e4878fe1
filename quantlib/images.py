"""Images decoded once: shards of uint8 pixels and labels that every evaluation maps into memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

# ImageNet's channel means and deviations, which every torchvision model is trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def save(pixels: np.ndarray, labels: np.ndarray, file: IO[bytes]) -> None:
    """Write a shard.

    Args:
        pixels: [N, H, W, 3], uint8, RGB.
        labels: [N], int64 class indices.
        file: Open for writing.
    """
    torch.save({"pixels": torch.from_numpy(pixels), "labels": torch.from_numpy(labels)}, file)


def open_shard(path: Path) -> tuple[Tensor, Tensor]:
    """A shard's pixels [N, H, W, 3] uint8 and labels [N] int64; pixels are mapped, not read."""
    shard = torch.load(path, weights_only=True, mmap=True)
    return shard["pixels"], shard["labels"]


def to_input(pixels: Tensor) -> Tensor:
    """Pixels [N, H, W, 3] uint8 to a model's input [N, 3, H, W] float32, normalized, channels last in memory.

    The same arithmetic as torchvision's ToTensor and Normalize, so the same bits.
    """
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(255)
    return x.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def batches(path: Path, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [n, 3, H, W] and labels [n] of a shard, in order; n is `batch_size`, but for what is left at the end."""
    pixels, labels = open_shard(path)
    for start in range(0, len(labels), batch_size):
        yield to_input(pixels[start : start + batch_size]), labels[start : start + batch_size]


def count(path: Path) -> int:
    """Number of images in a shard."""
    return len(open_shard(path)[1])
