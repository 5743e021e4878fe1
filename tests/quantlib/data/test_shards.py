"""Shards of decoded images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET, Normalization


def _shard(path, num_images):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (num_images, 9, 9, 3), dtype=np.uint8)
    labels = rng.integers(0, 5, num_images)
    with path.open("wb") as file:
        shards.save([pixels[:4], pixels[4:]], labels, IMAGENET, file)
    return path, pixels, labels


def test_inputs_are_bit_for_bit_torchvisions():
    # Every value of every channel.
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = np.concatenate([pixels, np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)])
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET.mean, IMAGENET.std)])

    got = shards.to_input(torch.from_numpy(pixels), IMAGENET)

    assert torch.equal(got, torch.stack([theirs(Image.fromarray(image)) for image in pixels]))
    assert got.shape == (4, 3, 16, 16)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("own", [Normalization((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), Normalization((0.1307,), (0.3081,))])
def test_a_shard_gives_the_inputs_of_the_model_it_was_decoded_for(own, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 12, own.num_channels), dtype=np.uint8)
    with (tmp_path / "shard").open("wb") as file:
        shards.save([pixels], np.zeros(3, dtype=np.int64), own, file)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(own.mean, own.std)])

    shard = shards.open_shard(tmp_path / "shard")

    expected = torch.stack([theirs(image) for image in pixels])
    assert torch.equal(shard.inputs(), expected)
    assert torch.equal(shard.inputs(1, 2), expected[1:2])
    assert torch.equal(next(shards.batches(tmp_path / "shard", 2))[0], expected[:2])


def test_making_inputs_leaves_the_pixels_as_they_were():
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    before = pixels.clone()

    shards.to_input(pixels, IMAGENET)

    assert torch.equal(pixels, before)


def test_a_shard_comes_back_as_it_was_written(tmp_path):
    path, pixels, labels = _shard(tmp_path / "shard", 7)

    shard = shards.open_shard(path)

    assert shards.count(path) == len(shard) == 7
    assert shard.normalization == IMAGENET
    assert np.array_equal(shard.pixels.numpy(), pixels)
    assert np.array_equal(shard.labels.numpy(), labels)


def test_a_shard_has_the_same_bytes_each_time():
    pixels, labels = np.zeros((2, 4, 4, 3), dtype=np.uint8), np.zeros(2, dtype=np.int64)
    first, second = io.BytesIO(), io.BytesIO()
    shards.save([pixels], labels, IMAGENET, first)
    shards.save([pixels[:1], pixels[1:]], labels.copy(), IMAGENET, second)

    assert first.getvalue() == second.getvalue()


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3, 1]), (7, [7]), (50, [7])])
def test_batches_hold_every_image_once_and_in_order(tmp_path, batch_size, sizes):
    path, pixels, labels = _shard(tmp_path / "shard", 7)

    parts = list(shards.batches(path, batch_size))

    assert [len(x) for x, _ in parts] == sizes
    assert torch.equal(torch.cat([x for x, _ in parts]), shards.to_input(torch.from_numpy(pixels), IMAGENET))
    assert np.array_equal(torch.cat([y for _, y in parts]).numpy(), labels)
