"""Images of a split, decoded in batches."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from quantlib.data.datasets import open_split
from quantlib.data.images import Split
from quantlib.data.transforms import Transform
from quantlib.errors import DataError
from quantlib.progress import Progress, silent

if TYPE_CHECKING:
    from quantlib.data.split import SplitInput, Subset

# One decoding thread per core keeps two cores busy: PIL releases the interpreter's lock while it works.
_NUM_THREADS = 2


def select(selection: Subset) -> tuple[Split, np.ndarray]:
    """A selection's split, and the numbers of its images, [n] int64.

    Raises:
        DataError: If the split has changed since it was identified.
    """
    source = selection.split
    split = _open_identified(source)
    if len(split) != source.num_images or split.classes != source.classes:
        raise DataError(f"The {source.name} split of {source.root} has changed since the run began: run again.")
    order = np.arange(len(split)) if selection.seed is None else shuffled(len(split), selection.seed)
    return split, order[selection.start : selection.stop]


def find_names(selection: Subset) -> list[str] | None:
    """Names of a selection's images: for files, their path below the dataset's folder.

    None if the dataset has changed since it was identified.
    """
    try:
        split, indices = select(selection)
    except DataError:
        return None
    below = f"{selection.split.root}/"
    return [split.name_of(index).removeprefix(below) for index in indices]


@functools.lru_cache(maxsize=2)
def _open_identified(source: SplitInput) -> Split:
    """Opened once per process: listing a million files takes as long as some stages."""
    return open_split(source.format, source.root, source.name)


def shuffled(num_images: int, seed: int) -> np.ndarray:
    """The numbers 0 … num_images - 1 in an order determined by the seed alone, [num_images] int64."""
    return np.random.default_rng(seed).permutation(num_images)


def decode(
    split: Split,
    indices: np.ndarray,
    transform: Transform,
    seed: int,
    progress: Progress = silent,
) -> Iterator[np.ndarray]:
    """Decode images in the order of `indices`, some at a time: pixels [k, H, W, C] uint8.

    Args:
        split: The split that holds them.
        indices: Numbers of images, [n] int64.
        transform: Applied to each.
        seed: Seeds the transform's random choices.
        progress: Called with (images done, n).

    Raises:
        DataError: If an image cannot be decoded.
    """
    done = 0
    for pixels, _ in batches(split, indices, transform, seed, batch_size=64):
        yield pixels
        done += len(pixels)
        progress(done, len(indices))


def batches(
    split: Split, indices: np.ndarray, transform: Transform, seed: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decoded batches of pixels [n, H, W, C] and labels [n], the next ones decoded while one is used.

    Raises:
        DataError: If an image cannot be decoded.
    """

    def decode_batch(start: int) -> np.ndarray:
        chunk = indices[start : start + batch_size]
        # One generator per image, seeded by its position: batch size and thread make no difference.
        return np.stack(
            [
                split.pixels(int(index), transform, random.Random(f"{seed}-{place}"))
                for place, index in enumerate(chunk, start=start)
            ]
        )

    starts = range(0, len(indices), batch_size)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        waiting = deque(pool.submit(decode_batch, start) for start in starts[:_NUM_THREADS])
        for position, start in enumerate(starts):
            batch = waiting.popleft().result()
            # No more batches are decoded ahead than there are threads, so memory use stays flat.
            if position + _NUM_THREADS < len(starts):
                waiting.append(pool.submit(decode_batch, starts[position + _NUM_THREADS]))
            yield batch, split.labels[indices[start : start + batch_size]]
