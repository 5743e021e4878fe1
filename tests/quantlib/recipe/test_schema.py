"""The recipe: what it may contain, and what is reported if it is wrong."""

import copy
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from quantlib.errors import RecipeError
from quantlib.recipe.interface import Interface
from quantlib.recipe.schema import Recipe, parse_recipe, suggest
from quantlib.recipe.sections import Section

MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "model": {"weights": "train"},
    "data": {"format": "digits"},
    "ptq": [{"name": "minmax"}],
    "qat": [{"name": "qat"}],
}


def _with(key, value):
    """The minimal recipe with one value changed, by dotted key."""
    tables = copy.deepcopy(MINIMAL)
    *parents, last = key.split(".")
    place: Any = tables
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[last] = value
    return tables


def test_what_a_recipe_leaves_out_is_the_designs_default():
    recipe = parse_recipe(MINIMAL)

    assert recipe.model.architecture == "mobilenet_v2"
    assert (recipe.data.resize, recipe.data.crop) == (None, None)
    assert (recipe.calibration.batch_size, recipe.calibration.num_batches, recipe.calibration.transform) == (
        30,
        32,
        "eval",
    )
    assert (recipe.qat[0].epochs, recipe.qat[0].batches_per_epoch, recipe.qat[0].learning_rate) == (8, None, 1e-4)
    assert (recipe.qat[0].freeze_batch_norm_after_epoch, recipe.qat[0].freeze_observer_after_epoch) == (-2, -2)
    assert recipe.evaluation.select_on == "held_out"
    assert recipe.gate.max_top1_drop == 0.01


# Errors name what is wrong and what is allowed


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("evaluaton", "evaluation"),
        ("qat.0.epoch", "epochs"),
        ("ptq.0.qconfg", "qconfig"),
        ("model.training.batchsize", "batch_size"),
        ("gate.max_top1", "max_top1_drop"),
        ("evaluation.max_image", "max_images"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_that_is_known(key, nearest):
    with pytest.raises(RecipeError, match=rf"Unknown key '{key}' \(did you mean '{nearest}'\?\)\. Allowed here: "):
        parse_recipe(_with(key, 1))


def test_an_unknown_key_unlike_any_other_is_named_with_all_that_are_known():
    with pytest.raises(RecipeError, match=r"Unknown key 'ptq\.0\.zzz'\. Allowed here: name, qconfig, .*float_layers\."):
        parse_recipe(_with("ptq.0.zzz", 1))


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("ptq.0.qconfig", "fbgem", "fbgemm"),
        ("engine", "onednnn", "onednn"),
        ("evaluation.select_on", "held out", "held_out"),
        ("calibration.transform", "evaluate", "eval"),
    ],
)
def test_an_unknown_value_is_named_with_the_nearest_that_is_known(key, value, nearest):
    with pytest.raises(
        RecipeError, match=rf"{key} = '{value}' is unknown \(did you mean '{nearest}'\?\)\. Allowed: .*{nearest}"
    ):
        parse_recipe(_with(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qat.0.epochs", 0),
        ("qat.0.epochs", 2.5),
        ("qat.0.epochs", "many"),
        ("qat.0.batch_size", 1),
        ("qat.0.learning_rate", 0),
        ("qat.0.learning_rate", float("nan")),
        ("qat.0.learning_rate", float("inf")),
        ("qat.0.freeze_observer_after_epoch", -3),
        ("model.training.learning_rate", float("inf")),
        ("gate.max_top1_drop", 1.5),
        ("gate.max_top1_drop", float("nan")),
        ("data.crop", -3),
        ("data.train_scale", [0.5, 0.2]),
        ("data.train_scale", [0.0, 0.5]),
        ("data.train_scale", [0.5, 1.2]),
        ("benchmark.num_samples", 9),
        ("benchmark.batch_sizes", [0]),
        ("seed", -1),
        ("ptq.0.name", "two words"),
        ("ptq.0.name", "../escape"),
        ("model", 3),
        ("ptq", {"name": "a table where a list is wanted"}),
        ("qat.0.name", ""),
        ("data.crop", 10**30),
        ("data.resize", 16385),
        ("qat.0.epochs", 2**31),
        ("qat.0.learning_rate", 1e300),
        ("description", "half \ud800"),
        ("description", "two\nlines"),
        ("description", "x" * 1001),
        ("model.weights", "\0"),
        ("data.root", "x" * 4097),
        ("qat.0.float_layers", ["x"] * 1001),
        ("benchmark.num_threads", [1025]),
    ],
)
def test_a_value_out_of_its_range_is_named(key, value):
    with pytest.raises(RecipeError, match=rf"^{key}.* is not allowed: ") as caught:
        parse_recipe(_with(key, value))
    assert len(str(caught.value)) < 400


def _nested(depth):
    return {"a": _nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (_nested(5), "nested 3 deep"),
        (_nested(300), "nested 3 deep"),
        ({"a": 10**30}, "whole numbers"),
        ({"a": [1.0, float("inf")]}, "numbers may be"),
        ({"a": {"b": "half \ud800"}}, "line of 1000"),
        ({"half \ud800": 1}, "line of 1000"),
        ({"a": "x" * 1001}, "line of 1000"),
        ({"a": [0] * 1001}, "at most 1000"),
        ({"a": datetime(2026, 1, 1, tzinfo=UTC)}, "neither a string"),
    ],
)
def test_arguments_that_cannot_be_stored_are_refused(arguments, fault):
    with pytest.raises(RecipeError, match=f"^model.arguments.*{fault}") as caught:
        parse_recipe(_with("model.arguments", arguments))
    assert len(str(caught.value)) < 400


def test_arguments_are_what_toml_and_json_can_say():
    arguments = {"width_mult": 0.25, "setting": [[1, 16, 1, 1], [2, 24, 1, 2]], "flag": True, "name": "ä", "none": None}
    assert parse_recipe(_with("model.arguments", arguments)).model.arguments == arguments


def test_a_missing_key_is_named():
    tables = copy.deepcopy(MINIMAL)
    del tables["data"]["format"]

    with pytest.raises(RecipeError, match=r"Missing key 'data\.format'"):
        parse_recipe(tables)


def test_only_an_exported_model_needs_no_weights():
    with pytest.raises(RecipeError, match="model: weights is missing"):
        parse_recipe(_with("model", {"architecture": "mobilenet_v2"}))

    assert parse_recipe(_with("model", {"architecture": "file:model.pt2"})).model.weights is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "train"}, "weights = 'train' is not for an exported model"),
        (
            {"weights": "torchvision:IMAGENET1K_V1"},
            "weights = 'torchvision:IMAGENET1K_V1' is not for an exported model",
        ),
        ({"arguments": {"num_classes": 3}}, "arguments are not for an exported model"),
    ],
)
def test_an_exported_model_is_as_it_is(keys, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(_with("model", {"architecture": "file:model.pt2", **keys}))


def test_all_errors_are_reported_at_once():
    tables = _with("qat.0.epochs", 0) | {"colour": "red"}

    with pytest.raises(RecipeError) as error:
        parse_recipe(tables)

    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": [0.5, 0.5], "std": [0.2, 0.2]}, r"mean has 2 values for 3 channels; give one per channel"),
        ({"channels": 1, "mean": [0.5], "std": [0.2, 0.2, 0.2]}, r"std has 3 values for 1 channels"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean and std belong together"),
        ({"channels": 1}, "channels = 1 needs mean and std, as the model was trained with"),
        ({"channels": 2}, "channels"),
        ({"mean": [0.5] * 3, "std": [0.2, 0.2, 0.0]}, "std"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"crop": [32, 32, 32]}, "crop"),
    ],
)
def test_a_wrong_input_of_the_model_is_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        parse_recipe(_with("data", {"format": "digits"} | changes))


def test_the_models_input_may_be_grey_and_rectangular():
    data = parse_recipe(
        _with("data", {"format": "digits", "channels": 1, "mean": [0.1], "std": [0.3], "crop": [28, 56]})
    ).data
    assert (data.channels, data.mean, data.crop) == (1, (0.1,), (28, 56))


def test_an_order_of_dimensions_is_for_pixels_only():
    tables = {**MINIMAL, "export": {"layout": "nhwc"}}
    with pytest.raises(RecipeError, match=r'export: layout = "nhwc" is for pixels: set input = "uint8", or leave'):
        parse_recipe(tables)
    tables["export"]["input"] = "uint8"
    assert parse_recipe(tables).export.interface == Interface(input="uint8", layout="nhwc")


def test_a_recipe_without_branches_is_refused():
    with pytest.raises(RecipeError, match=r"nothing to quantize: add a \[\[ptq\]\] or a \[\[qat\]\]"):
        parse_recipe({key: value for key, value in MINIMAL.items() if key not in {"ptq", "qat"}})


@pytest.mark.parametrize(("key", "name"), [("qat.0.name", "minmax"), ("ptq.0.name", "float")])
def test_two_branches_of_one_name_are_refused(key, name):
    with pytest.raises(RecipeError, match=f"branch name '{name}' is taken"):
        parse_recipe(_with(key, name))


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(MINIMAL).gate.max_top1_drop = 1.0


def test_suggestions_end_the_sentence():
    assert suggest("epoch", ["epochs", "name"]) == " (did you mean 'epochs'?)."
    assert suggest("zzz", ["epochs", "name"]) == "."


def test_every_key_of_the_recipe_is_described():
    missing = [
        (section.__name__, key)
        for section in Section.__subclasses__()
        for key, field in section.model_fields.items()
        if not field.description
    ]

    assert Recipe in Section.__subclasses__()
    assert missing == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluation.batch_size", "3"),
        ("evaluation.batch_size", 3.0),
        ("evaluation.batch_size", True),
        ("evaluation.simulate", 1),
        ("evaluation.simulate", "yes"),
        ("gate.max_top1_drop", "0.5"),
        ("benchmark.batch_sizes", ["1"]),
        ("seed", "1"),
    ],
)
def test_a_value_of_another_type_is_refused_and_not_converted(key, value):
    *sections, name = key.split(".")
    tables = {name: value}
    for section in sections:
        tables = {section: tables}
    recipe = {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
    with pytest.raises(RecipeError, match=re.escape(key)):
        parse_recipe(recipe | tables)


def test_a_whole_number_will_do_for_a_fraction():
    recipe = {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
    assert parse_recipe(recipe | {"gate": {"max_top1_drop": 1}}).gate.max_top1_drop == 1.0


def _stopping(evaluation, **tables):
    recipe = {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
    found = parse_recipe(recipe | {"evaluation": evaluation} | tables)
    return found.may_stop, found.stops("p"), found.stops("search-1-minmax")


@pytest.mark.parametrize(
    ("evaluation", "tables", "expected"),
    [
        ({}, {}, (False, False, False)),
        ({}, {"search": {}}, (True, False, True)),
        ({"stop": "certain"}, {}, (True, True, True)),
        ({"stop": "never"}, {"search": {}}, (False, False, False)),
        ({"select_on": "validation"}, {"search": {}}, (False, False, False)),
    ],
)
def test_evaluation_stops_where_asked_and_by_default_in_the_searchs_trials(evaluation, tables, expected):
    assert _stopping(evaluation, **tables) == expected


def test_evaluation_cannot_stop_where_choices_are_made_on_validation():
    with pytest.raises(RecipeError, match='stop = "certain" with select_on = "validation" saves no image'):
        _stopping({"stop": "certain", "select_on": "validation"})
