import pyarrow as pa

from quantlib.report.disagreement import compare


def predictions(**answers):
    """The table `predictions` for four images with the labels 0 to 3."""
    return pa.Table.from_pylist(
        [
            {"variant": variant, "image_index": number, "label": number, "top5": [answer, 0]}
            for variant, found in answers.items()
            # In any order, as files may return them.
            for number, answer in reversed(list(enumerate(found)))
        ]
    )


def test_confusions_that_got_worse_are_counted_against_float():
    # Image 3 is broken by int8; image 0 is wrong in both, but differently.
    found = compare(predictions(float=[1, 1, 2, 3], trained=[2, 1, 2, 1]), "trained")
    assert (found.num_images, found.num_broken, found.num_fixed, found.broken) == (4, 1, 0, (3,))
    assert {(c.label, c.answer, c.in_float, c.in_variant) for c in found.worse} == {(0, 2, 0, 1), (3, 1, 0, 1)}


def test_an_image_that_only_int8_gets_right_is_fixed():
    found = compare(predictions(float=[1, 1, 2, 3], trained=[0, 1, 2, 3]), "trained")
    assert (found.num_broken, found.num_fixed, found.worse) == (0, 1, ())


def test_images_that_only_float_answered_are_left_out():
    found = compare(predictions(float=[1, 1, 2, 3], trained=[0, 1]), "trained")
    assert (found.num_images, found.num_broken, found.num_fixed) == (2, 0, 1)
