"""The recipe: what it may say, and what is said of one that is wrong."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from quantlib.errors import RecipeError
from quantlib.recipe import Recipe, Section, load_recipe, parse_recipe, suggest

MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "model": {"weights": "train"},
    "data": {"format": "digits"},
    "ptq": [{"name": "minmax"}],
    "qat": [{"name": "qat"}],
}

_FILE = """
name = "file"
[model]
weights = "weights.pth"
[data]
format = "imagefolder"
root = "images"
[[ptq]]
name = "first"
[[ptq]]
name = "second"
[[qat]]
name = "third"
"""


def _with(key: str, value: Any) -> dict[str, Any]:
    """The minimal recipe with one value changed, by dotted key."""
    tables = copy.deepcopy(MINIMAL)
    *parents, last = key.split(".")
    place: Any = tables
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[last] = value
    return tables


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "file.toml"
    path.parent.mkdir()
    path.write_text(_FILE)
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.toml")))
def test_every_ready_recipe_loads_and_is_named_as_its_file(pytestconfig: pytest.Config, name: str) -> None:
    recipe = load_recipe(pytestconfig.rootpath / "recipes" / f"{name}.toml")

    assert recipe.name == name
    assert recipe.description


def test_what_a_recipe_leaves_out_is_the_designs_default() -> None:
    recipe = parse_recipe(MINIMAL)

    assert recipe.model.architecture == "mobilenet_v2"
    assert (recipe.data.resize, recipe.data.crop) == (256, 224)
    assert (recipe.calibration.batch_size, recipe.calibration.num_batches, recipe.calibration.transform) == (
        30,
        32,
        "eval",
    )
    assert (recipe.qat[0].epochs, recipe.qat[0].batches_per_epoch, recipe.qat[0].learning_rate) == (8, None, 1e-4)
    assert (recipe.qat[0].freeze_batch_norm_after_epoch, recipe.qat[0].freeze_observer_after_epoch) == (-2, -2)
    assert recipe.evaluation.select_on == "held_back"
    assert recipe.gate.max_top1_drop == 0.01


# What is wrong is named, with what is allowed


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
def test_an_unknown_key_is_named_with_the_nearest_that_is_known(key: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"Unknown key '{key}' \(did you mean '{nearest}'\?\)\. Allowed here: "):
        parse_recipe(_with(key, 1))


def test_an_unknown_key_unlike_any_other_is_named_with_all_that_are_known() -> None:
    with pytest.raises(RecipeError, match=r"Unknown key 'ptq\.0\.zzz'\. Allowed here: name, qconfig, .*float_layers\."):
        parse_recipe(_with("ptq.0.zzz", 1))


@pytest.mark.parametrize(
    ("key", "value", "nearest"),
    [
        ("ptq.0.qconfig", "fbgem", "fbgemm"),
        ("engine", "onednnn", "onednn"),
        ("evaluation.select_on", "heldback", "held_back"),
        ("calibration.transform", "evaluate", "eval"),
    ],
)
def test_an_unknown_value_is_named_with_the_nearest_that_is_known(key: str, value: str, nearest: str) -> None:
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
    ],
)
def test_a_value_out_of_its_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"^{key}.* is not allowed: "):
        parse_recipe(_with(key, value))


def test_a_missing_key_is_named() -> None:
    tables = copy.deepcopy(MINIMAL)
    del tables["model"]["weights"]

    with pytest.raises(RecipeError, match=r"Missing key 'model\.weights'"):
        parse_recipe(tables)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    tables = _with("qat.0.epochs", 0) | {"colour": "red"}

    with pytest.raises(RecipeError) as error:
        parse_recipe(tables)

    assert len(str(error.value).splitlines()) == 2


def test_a_crop_larger_than_the_resized_image_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data: crop = 64 does not fit into resize = 32"):
        parse_recipe(_with("data", {"format": "digits", "resize": 32, "crop": 64}))
    parse_recipe(_with("data", {"format": "digits", "resize": 32, "crop": 32}))


def test_a_recipe_without_branches_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"nothing to quantize: add a \[\[ptq\]\] or a \[\[qat\]\]"):
        parse_recipe({key: value for key, value in MINIMAL.items() if key not in {"ptq", "qat"}})


@pytest.mark.parametrize(("key", "name"), [("qat.0.name", "minmax"), ("ptq.0.name", "float")])
def test_two_branches_of_one_name_are_refused(key: str, name: str) -> None:
    with pytest.raises(RecipeError, match=f"branch name '{name}' is taken"):
        parse_recipe(_with(key, name))


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(MINIMAL).gate.max_top1_drop = 1.0


# Files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"No recipe '.*nowhere\.toml'"):
        load_recipe(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(content)

    with pytest.raises(RecipeError, match=r"bad\.toml' cannot be read as TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_paths_in_a_file_are_relative_to_it(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe_file.parent.parent)

    recipe = load_recipe(Path("recipes/file.toml"))

    assert recipe.model.weights == str(recipe_file.parent / "weights.pth")
    assert recipe.data.root == str(recipe_file.parent / "images")


def test_absolute_paths_and_those_of_the_users_home_stay(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe_file.write_text(_FILE.replace("weights.pth", "/models/w.pth").replace('"images"', '"~/images"'))

    recipe = load_recipe(recipe_file)

    assert recipe.model.weights == "/models/w.pth"
    assert recipe.data.root == "/home/somebody/images"


@pytest.mark.parametrize("weights", ["train", "torchvision:IMAGENET1K_V1"])
def test_weights_that_are_no_file_stay(recipe_file: Path, weights: str) -> None:
    recipe_file.write_text(_FILE.replace("weights.pth", weights))

    assert load_recipe(recipe_file).model.weights == weights


# Overrides


def test_overrides_reach_into_tables_and_branches_and_are_toml(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "qat.0.epochs=2",
            "qat.0.learning_rate=1e-3",
            "ptq.1.qconfig=default",
            "evaluation.simulate=true",
            "benchmark.batch_sizes=[1, 8]",
            "model.arguments={width_mult = 0.5}",
            "model.arguments.num_classes=7",
            'description="a = b"',
            "data.format=package.module:function",
        ],
    )

    assert (recipe.qat[0].epochs, recipe.qat[0].learning_rate) == (2, 1e-3)
    assert [branch.qconfig for branch in recipe.ptq] == ["accurate", "default"]
    assert recipe.evaluation.simulate is True
    assert recipe.benchmark.batch_sizes == (1, 8)
    assert recipe.model.arguments == {"width_mult": 0.5, "num_classes": 7}
    assert recipe.description == "a = b"
    assert recipe.data.format == "package.module:function"


def test_the_last_of_two_overrides_counts(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_paths_in_overrides_are_relative_to_the_working_folder(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    recipe = load_recipe(recipe_file, ["data.root=elsewhere/images", 'model.weights="mine.pth"'])

    assert recipe.data.root == str(tmp_path / "elsewhere" / "images")
    assert recipe.model.weights == str(tmp_path / "mine.pth")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("qat.0.epochs", "has no value: write KEY=VALUE"),
        ("=3", "has no value"),
        ("qat.1.epochs=2", r"'1' is no branch of this recipe; it has 1, counted from 0"),
        ("qat.first.epochs=2", "'first' is no branch"),
        ("ptq.2={}", "'2' is no branch of this recipe; it has 2"),
        ("name.first=1", "'name' is a value, not a table"),
        ("name.first.second=1", "lies below a value"),
        ("qat.0.epoch=2", r"Unknown key 'qat\.0\.epoch' \(did you mean 'epochs'"),
        ("qat.0.epochs=few", r"qat\.0\.epochs = 'few' is not allowed"),
    ],
)
def test_an_override_that_is_wrong_is_named(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, [override])


def test_suggestions_end_the_sentence() -> None:
    assert suggest("epoch", ["epochs", "name"]) == " (did you mean 'epochs'?)."
    assert suggest("zzz", ["epochs", "name"]) == "."


def test_every_key_of_the_recipe_is_described() -> None:
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
