import io

import numpy as np
import pytest
from PIL import Image

from quantlib.data import shards
from quantlib.measure import examples
from quantlib.measure.predictions import Predictions


def predictions(labels, answers, loss):
    return Predictions(np.array(labels), np.array([[answer, 9] for answer in answers]), np.array(loss, np.float32))


LABELS = [0, 1, 2, 3, 4]
BEFORE = predictions(LABELS, [0, 1, 2, 5, 6], [0.1, 0.1, 0.1, 2.0, 2.0])
# 0 is the same; 1 and 2 are broken, 2 by more; 3 is fixed; 4 is wrong both times, and its loss rose most.
AFTER = predictions(LABELS, [0, 0, 0, 3, 7], [0.1, 1.0, 3.0, 0.1, 9.0])


def test_broken_images_come_first_and_among_them_those_whose_loss_rose_most():
    assert examples.choose(BEFORE, AFTER, 12) == [2, 1, 4, 3]
    assert examples.choose(BEFORE, AFTER, 1) == [2]


def test_models_that_agree_have_no_examples():
    assert examples.choose(BEFORE, BEFORE, 12) == []


def test_ties_are_taken_in_the_images_order():
    after = predictions(LABELS, [9, 9, 9, 9, 9], [1.1, 1.1, 1.1, 3.0, 3.0])
    assert examples.choose(BEFORE, after, 12) == [0, 1, 2, 3, 4]


def test_each_example_has_its_own_picture_whichever_shard_it_lies_in():
    pixels = np.stack([np.full((4, 4, 3), 10 * number, np.uint8) for number in range(5)])
    found = examples.pick("a", BEFORE, AFTER, [pixels[:1], pixels[1:3], pixels[3:]], 12)
    assert [(e.image_index, e.label, e.float_top1, e.int8_top1) for e in found] == [
        (2, 2, 2, 0),
        (1, 1, 1, 0),
        (4, 4, 6, 7),
        (3, 3, 5, 3),
    ]
    for example in found:
        picture = np.asarray(Image.open(io.BytesIO(example.png)))
        assert np.array_equal(picture, pixels[example.image_index])


def test_pictures_are_the_models_input_from_a_decoded_shard(val_shard):
    shard = shards.open_shard(val_shard)
    pixels, labels = shard.pixels, shard.labels
    before = predictions(labels.tolist(), labels.tolist(), [0.0] * len(labels))
    after = predictions(labels.tolist(), ((labels + 1) % 3).tolist(), [1.0] * len(labels))
    found = examples.pick("a", before, after, [pixels], 3)
    assert [example.label for example in found] == labels[:3].tolist()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[2].png))), pixels[2].numpy())


@pytest.mark.parametrize(("size", "drawn"), [((224, 224), (96, 96)), ((16, 16), (16, 16)), ((200, 100), (96, 48))])
def test_a_picture_is_made_smaller_and_never_larger(size, drawn):
    content = examples.draw(np.zeros((size[1], size[0], 3), np.uint8))
    assert Image.open(io.BytesIO(content)).size == drawn


def test_examples_come_back_as_they_were_saved():
    found = examples.pick("a", BEFORE, AFTER, [np.zeros((5, 4, 4, 3), np.uint8)], 12)
    assert examples.load(examples.save(found)) == tuple(found)
    assert examples.load(examples.save([])) == ()
