"""From an image to the square that a model takes."""

import random

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from quantlib.data.images import Split
from quantlib.data.normalization import Normalization
from quantlib.data.transforms import EvalTransform, TrainTransform


def _image(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "height"), [(80, 60), (60, 80), (31, 97), (32, 32), (20, 13)])
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (40, 32), (37, 30)])
def test_evaluation_is_torchvisions_pixel_for_pixel(width, height, resize, crop):
    image = _image(width, height)
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop)])

    got = EvalTransform(resize=resize, crop=(crop, crop))(image, random.Random())

    assert got.size == (crop, crop)
    assert np.array_equal(np.asarray(got), np.asarray(theirs(image)))


@pytest.mark.parametrize(("width", "height"), [(80, 60), (31, 97), (20, 13)])
def test_training_is_torchvisions_pixel_for_pixel_once_the_box_is_drawn(rng, width, height):
    image = _image(width, height)
    transform = TrainTransform(crop=(32, 32), scale=(0.08, 1.0), flip=0.5)
    for _ in range(10):
        state = rng.getstate()
        got = transform(image, rng)
        rng.setstate(state)
        theirs = functional.resized_crop(image, *transform._box(width, height, rng), [32, 32])
        theirs = functional.hflip(theirs) if rng.random() < 0.5 else theirs

        assert np.array_equal(np.asarray(got), np.asarray(theirs))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("resize", "crop"), [(40, (24, 36)), ((30, 50), (30, 40))])
def test_other_sizes_and_interpolations_are_torchvisions_too(interpolation, resize, crop):
    image = _image(80, 60)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([transforms.Resize(resize, mode), transforms.CenterCrop(crop)])

    got = EvalTransform(resize=resize, crop=crop, interpolation=interpolation)(image, random.Random())

    assert got.size == (crop[1], crop[0])
    assert np.array_equal(np.asarray(got), np.asarray(theirs(image)))


@pytest.mark.parametrize(
    "make",
    [
        lambda grey: EvalTransform(resize=20, crop=(12, 16), normalization=grey),
        lambda grey: TrainTransform(crop=(12, 16), scale=(0.5, 1.0), flip=0.5, normalization=grey),
    ],
)
def test_a_model_of_one_channel_gets_grey_pixels(rng, make):
    transform = make(Normalization((0.5,), (0.25,)))
    image = _image(40, 30)
    split = Split(np.zeros(1, dtype=np.int64), ("a",), lambda _: image, str)
    assert transform.input_shape == (1, 12, 16)
    assert transform(image, rng).mode == "L"
    assert split.pixels(0, transform, rng).shape == (12, 16, 1)


def test_evaluation_draws_nothing(rng):
    before = rng.getstate()
    EvalTransform(resize=16, crop=(16, 16))(_image(20, 20), rng)

    assert rng.getstate() == before


@pytest.mark.parametrize(("width", "height"), [(80, 60), (60, 80), (64, 64)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 0.4)])
def test_training_boxes_lie_inside_the_image_and_have_the_asked_area_and_shape(rng, width, height, scale):
    transform = TrainTransform(crop=(32, 32), scale=scale, flip=0.5)
    boxes = [transform._box(width, height, rng) for _ in range(4000)]

    shares, ratios = [], []
    for top, left, h, w in boxes:
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        shares.append(w * h / (width * height))
        ratios.append(w / h)
    # Sides are whole pixels: half a pixel of the smallest side, 15, is 3%.
    assert scale[0] * 0.93 <= min(shares)
    assert max(shares) <= min(1, scale[1] * 1.07)
    assert min(ratios) >= 0.75 * 0.93
    assert max(ratios) <= 4 / 3 * 1.07
    # Uniform in area, and in the logarithm of the shape.
    if scale == (0.3, 0.4):
        assert np.mean(shares) == pytest.approx(0.35, abs=0.003)
        assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.012)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (100, 10, (0, 43, 10, 13)),  # 13 is 10 · 4/3; the middle
        (10, 100, (43, 0, 13, 10)),
        (300, 1, (0, 149, 1, 1)),
    ],
)
def test_an_image_too_long_for_any_box_gives_its_middle(rng, width, height, box):
    assert TrainTransform(crop=(8, 8), scale=(1.0, 1.0), flip=0.0)._box(width, height, rng) == box


def test_a_training_crop_of_everything_is_the_resized_image(rng):
    image = _image(40, 40)
    transform = TrainTransform(crop=(16, 16), scale=(1.0, 1.0), flip=0.0)
    # Only the square has the image's area and fits.
    box = next(box for box in iter(lambda: transform._box(40, 40, rng), None) if box[2:] == (40, 40))

    assert box == (0, 0, 40, 40)
    assert transform(image, rng).size == (16, 16)


@pytest.mark.parametrize(("flip", "expected"), [(0.0, 0), (1.0, 200), (0.5, 100)])
def test_images_are_mirrored_as_often_as_asked(rng, flip, expected):
    # Left half black, right half white: any crop shows which way round it is.
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (20, 0, 40, 40))
    transform = TrainTransform(crop=(8, 8), scale=(0.99, 1.0), flip=flip)
    mirrored = 0
    for _ in range(200):
        row = np.asarray(transform(image, rng))[4, :, 0]
        mirrored += int(row[0]) > int(row[-1])

    assert abs(mirrored - expected) <= (0 if flip in {0.0, 1.0} else 25)  # 3.5 standard deviations of 7.1


def test_training_is_a_function_of_the_seed():
    image, transform = _image(50, 40), TrainTransform(crop=(16, 16), scale=(0.08, 1.0), flip=0.5)
    same, again, other = (np.asarray(transform(image, random.Random(seed))) for seed in (1, 1, 2))

    assert np.array_equal(same, again)
    assert not np.array_equal(same, other)


@pytest.mark.parametrize("size", [(1, 10_000), (65_500, 1)])
def test_only_what_the_crop_needs_of_a_long_thin_image_is_resized(size, rng):
    sizes = []

    class Watched(Image.Image):
        def resize(self, size, *arguments, **options):
            sizes.append(size)
            return Image.new("RGB", size)

    watched = Watched()
    watched._size = size
    EvalTransform(resize=256, crop=(224, 224))(watched, rng)
    TrainTransform(crop=(224, 224), scale=(0.08, 1.0), flip=0.0)(Image.new("RGB", size), rng)
    assert sizes == [(224, 224)]


def test_the_middle_of_a_long_image_is_what_resizing_all_of_it_would_give(rng):
    noise = np.random.default_rng(0).integers(0, 256, (16, 400, 3), np.uint8)
    image = Image.fromarray(noise).resize((1600, 64))
    whole = image.resize((800, 32), Image.Resampling.BILINEAR).crop((400 - 14, 2, 400 + 14, 30))
    found = EvalTransform(resize=32, crop=(28, 28))(image, rng)
    assert np.abs(np.asarray(found, int) - np.asarray(whole, int)).mean() < 1.0
