"""The recipe file: where it is, what its paths mean, and how the command line changes its values."""

from pathlib import Path

import pytest

from quantlib.errors import RecipeError
from quantlib.recipe.file import load_recipe

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


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipes" / "file.toml"
    path.parent.mkdir()
    path.write_text(_FILE)
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[3] / "recipes").glob("*.toml")))
def test_every_ready_recipe_loads_and_is_named_as_its_file(pytestconfig, name):
    recipe = load_recipe(pytestconfig.rootpath / "recipes" / f"{name}.toml")

    assert recipe.name == name
    assert recipe.description


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"No recipe '.*nowhere\.toml'"):
        load_recipe(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"a = " + b"[" * 5000 + b"]" * 5000])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    (tmp_path / "bad.toml").write_bytes(content)

    with pytest.raises(RecipeError, match=r"bad\.toml' cannot be read as TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_paths_in_a_file_are_relative_to_it(recipe_file, monkeypatch):
    monkeypatch.chdir(recipe_file.parent.parent)

    recipe = load_recipe(Path("recipes/file.toml"))

    assert recipe.model.weights == str(recipe_file.parent / "weights.pth")
    assert recipe.data.root == str(recipe_file.parent / "images")


def test_absolute_paths_and_those_of_the_users_home_stay(recipe_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe_file.write_text(_FILE.replace("weights.pth", "/models/w.pth").replace('"images"', '"~/images"'))

    recipe = load_recipe(recipe_file)

    assert recipe.model.weights == "/models/w.pth"
    assert recipe.data.root == "/home/somebody/images"


def test_the_path_of_an_exported_model_is_relative_to_the_recipe(recipe_file):
    recipe_file.write_text(_FILE.replace('weights = "weights.pth"', 'architecture = "file:nets/model.pt2"'))

    assert load_recipe(recipe_file).model.architecture == f"file:{recipe_file.parent}/nets/model.pt2"


@pytest.mark.parametrize("weights", ["train", "torchvision:IMAGENET1K_V1"])
def test_weights_that_are_no_file_stay(recipe_file, weights):
    recipe_file.write_text(_FILE.replace("weights.pth", weights))

    assert load_recipe(recipe_file).model.weights == weights


# Overrides


def test_overrides_reach_into_tables_and_branches_and_are_toml(recipe_file):
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


def test_the_last_of_two_overrides_counts(recipe_file):
    assert load_recipe(recipe_file, ["seed=1", "seed=2"]).seed == 2


def test_paths_in_overrides_are_relative_to_the_working_folder(recipe_file, tmp_path, monkeypatch):
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
def test_a_wrong_override_is_named(recipe_file, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, [override])
