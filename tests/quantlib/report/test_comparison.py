"""Two runs compared."""

import re

import pyarrow as pa
import pytest
from finished_runs import (
    FIRST,
    INGREDIENTS,
    RECIPE,
    SECOND,
    report,
    without_samples,
    write,
    write_run,
)

from quantlib.errors import RecipeError
from quantlib.report.comparison import compare_runs
from quantlib.report.ingredients import Change, CodeChange, flatten_recipe
from quantlib.store.journal import Journal
from quantlib.store.local import Store

OTHER_IMAGES = [f"other-{n}.png" for n in range(100)]


def compare(home, **second):
    """The first run is as `write_run` makes it; the second one differs."""
    write_run(home, FIRST)
    write_run(home, SECOND, **second)
    return compare_runs(home, FIRST, SECOND)


def test_equal_runs_have_no_changes(tmp_path):
    found = compare(tmp_path)
    assert (found.recipe, found.data, found.code, found.environment, found.notes) == ((), (), (), (), ())
    assert (found.winner.accuracy, found.winner.speed, found.winner.p_value) == ("same", "same", 1.0)
    assert [change.after for change in found.variants] == ["float", "small"]


def test_what_went_in_is_compared_by_key_fingerprint_module_and_version(tmp_path):
    changed = INGREDIENTS | {
        "code.quantlib.quantize.ranges": "c2",
        "images.split.fingerprint": '"f1"',
        "library.torch": "2.16.0",
        "runtime.version": '"1.33.0"',
    }
    recipe = RECIPE | {"ptq": [{"name": "new"}, {"name": "small", "observer": "minmax"}], "seed": 7}
    found = compare(tmp_path, recipe=recipe, ingredients=changed, cpu_model="Another CPU")
    keys = {change.name: (change.before, change.after) for change in found.recipe}
    assert keys["ptq.small.observer"] == (None, "minmax")
    assert keys["seed"] == (191009, 7)
    assert keys["ptq.new.name"] == (None, "new")
    assert "ptq.small.name" not in keys
    assert found.data == (Change("validation images", "f0", "f1"),)
    assert found.code == (CodeChange("calibrate", ("quantlib.quantize.ranges",)),)
    assert set(found.environment) == {
        Change("torch", "2.15.0", "2.16.0"),
        Change("onnxruntime", "1.32.0", "1.33.0"),
    }


def test_records_that_were_deleted_are_counted(tmp_path):
    write_run(tmp_path, FIRST)
    write_run(tmp_path, SECOND, ingredients=INGREDIENTS | {"code.calibrate": "c9"})
    Store(tmp_path / "store").remove_record(f"key of {FIRST}")
    found = compare_runs(tmp_path, FIRST, SECOND)
    assert found.code == ()
    assert f"1 of 1 records of run {FIRST} are no longer in the store" in found.notes[0]


@pytest.mark.parametrize(("num_right", "accuracy"), [(84, "worse"), (85, "same"), (95, "same"), (96, "better")])
def test_accuracy_is_compared_image_by_image_at_the_level_of_five_per_cent(num_right, accuracy, tmp_path):
    # The two differ in 5 or 6 images, all in one direction: p = 2 / 2 ** 5 = 0.0625 and 2 / 2 ** 6 = 0.03125.
    found = compare(tmp_path, num_right=num_right).winner
    assert (found.paired, found.accuracy) == (True, accuracy)
    assert found.top1_drop == pytest.approx(0.9 - num_right / 100)
    assert re.search(r"on the same \d+ images", found.accuracy_text)


@pytest.mark.parametrize(("num_right", "accuracy"), [(84, "same"), (70, "worse"), (99, "better")])
def test_other_validation_images_are_compared_as_a_whole_and_said_to_be(num_right, accuracy, tmp_path):
    found = compare(tmp_path, num_right=num_right, images=OTHER_IMAGES)
    assert (found.winner.paired, found.winner.p_value, found.winner.accuracy) == (False, None, accuracy)
    assert "not on the same images" in found.winner.accuracy_text
    assert "The runs evaluated different validation images" in found.notes[0]


def test_images_of_equal_names_are_not_the_same_if_the_data_changed(tmp_path):
    changed = compare(tmp_path, ingredients=INGREDIENTS | {"images.split.fingerprint": '"f1"'})
    assert not changed.winner.paired


@pytest.mark.parametrize(
    ("milliseconds", "float_ms", "speed"),
    [
        (1.0, 4.0, "same"),
        (1.1, 4.0, "slower"),
        (0.9, 4.0, "faster"),
        (1.5, 6.0, "same"),  # The machine is slower.
        (1.0, 3.0, "same"),  # Only float is faster.
    ],
)
def test_slower_is_what_is_slower_in_milliseconds_and_relative_to_float(milliseconds, float_ms, speed, tmp_path):
    found = compare(tmp_path, milliseconds=milliseconds, float_ms=float_ms).winner
    assert found.speed == speed
    assert found.latency_ratio == pytest.approx(milliseconds)
    assert found.latency_ratio_to_float == pytest.approx(milliseconds * 4 / float_ms, rel=0.02)


def test_speed_is_not_judged_on_another_cpu_or_without_single_times(tmp_path):
    assert compare(tmp_path, milliseconds=2.0, cpu_model="Another CPU").winner.speed == "unknown"
    write(tmp_path, without_samples(report(SECOND, milliseconds=2.0)))
    found = compare_runs(tmp_path, FIRST, SECOND).winner
    assert (found.speed, found.latency_ratio_to_float, found.latency_ratio) == ("unknown", None, 2.0)
    assert "not judged" in found.speed_text


def test_a_run_without_a_winner_is_compared_by_its_variants(tmp_path):
    found = compare(tmp_path, winner=False)
    assert found.winner is None
    assert len(found.variants) == 2
    assert found.notes == (f"Run {SECOND} has no winner.",)


def test_a_run_that_is_missing_or_unfinished_is_an_error_that_says_what_to_do(tmp_path):
    write_run(tmp_path, FIRST)
    with pytest.raises(RecipeError, match=f"No run 'nowhere'. The newest are: {FIRST}"):
        compare_runs(tmp_path, FIRST, "nowhere")
    write_run(tmp_path, SECOND)
    (Journal(tmp_path / "runs" / SECOND).folder / "outcome.json").unlink()
    with pytest.raises(RecipeError, match=f"Run {SECOND} is crashed, and only completed runs .*`quantflow runs"):
        compare_runs(tmp_path, FIRST, SECOND)


def test_a_recipe_is_flattened_to_keys_and_branches_go_by_their_names():
    tables = {
        "gate": {"runtimes": None},
        "ptq": [{"name": "a", "float_layers": ["x"]}],
        "qat": [],
        "data": {"mean": [0.5]},
    }
    assert flatten_recipe(tables) == {
        "gate.runtimes": None,
        "ptq.a.name": "a",
        "ptq.a.float_layers": ["x"],
        "qat": [],
        "data.mean": [0.5],
    }


def test_unknown_images_are_never_the_same(tmp_path):
    found = compare(tmp_path, images=pa.nulls(100, pa.string()))
    write_run(tmp_path, FIRST, images=pa.nulls(100, pa.string()))
    assert not found.winner.paired
    assert not compare_runs(tmp_path, FIRST, SECOND).winner.paired
