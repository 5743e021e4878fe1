"""Example images: a few on which a quantized model answers differently from float, as small pictures for the report."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from quantlib.measure.predictions import Predictions

# Enough to see what is in the picture, in a few kilobytes.
_MAX_SIDE = 96


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image that float and a variant answer differently."""

    variant: str
    """The quantized model."""
    image_index: int
    """Its index in the table `predictions`."""
    label: int
    """The image's class, as an index into the table `classes`."""
    float_top1: int
    """Float's likeliest class."""
    int8_top1: int
    """The variant's likeliest class."""
    png: bytes
    """The model's input, scaled down if a side is longer than 96 pixels."""


SCHEMA = pa.schema(
    {
        "variant": pa.string(),
        "image_index": pa.int64(),
        "label": pa.int64(),
        "float_top1": pa.int64(),
        "int8_top1": pa.int64(),
        "png": pa.binary(),
    }
)


def choose(before: Predictions, after: Predictions, num_examples: int) -> list[int]:
    """Choose images that two models answer differently, the most telling first.

    Args:
        before: Float's answers.
        after: A quantized model's, for the same images.
        num_examples: How many at most.

    Returns:
        Their numbers: first the images that only float gets right, then the rest; both by how much the loss rose.
    """
    different = np.flatnonzero(before.top5[:, 0] != after.top5[:, 0])
    broken = before.top1_correct[different] & ~after.top1_correct[different]
    rise = after.loss[different] - before.loss[different]
    order = np.lexsort((different, -rise, ~broken))[:num_examples]
    return [int(number) for number in different[order]]


def pick(
    variant: str, before: Predictions, after: Predictions, shards: Sequence[Any], num_examples: int
) -> list[Example]:
    """The images that `choose` finds, with their pictures.

    Args:
        variant: The variant that gave the answers `after`.
        before: Float's answers.
        after: The variant's, for the same images.
        shards: The images: arrays or tensors [n, H, W, C] uint8, one after another.
        num_examples: How many at most.
    """
    ends = np.cumsum([len(shard) for shard in shards])
    found = []
    for number in choose(before, after, num_examples):
        place = int(np.searchsorted(ends, number, side="right"))
        pixels = np.asarray(shards[place][number - int(ends[place])])  # A negative index, from the end.
        found.append(
            Example(
                variant=variant,
                image_index=number,
                label=int(before.labels[number]),
                float_top1=int(before.top5[number, 0]),
                int8_top1=int(after.top5[number, 0]),
                png=draw(pixels),
            )
        )
    return found


def draw(pixels: np.ndarray) -> bytes:
    """Pixels [H, W, C] uint8, grey or RGB, as a PNG file; never enlarged."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def save(examples: Sequence[Example]) -> bytes:
    """The examples as a Parquet file."""
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(example) for example in examples], schema=SCHEMA), content)
    return content.getvalue()


def load(content: bytes) -> tuple[Example, ...]:
    """What `save` wrote."""
    return tuple(Example(**row) for row in pq.read_table(io.BytesIO(content)).to_pylist())
