"""What the documents of a run's files say of its recipe; tests/flows/test_quantize.py checks the rest on a run."""

import pytest

from quantlib.recipe.schema import parse_recipe
from quantlib.report.documents import without_places


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"weights": "/home/me/w.pth"}, {"weights": "w.pth"}),
        ({"architecture": "file:/home/me/net.pt2"}, {"architecture": "file:net.pt2"}),
        ({"architecture": "timm:resnet10t", "weights": "timm:a1_in1k"},) * 2,
        ({"weights": "train"},) * 2,
    ],
)
def test_a_recipe_is_kept_without_defaults_and_of_paths_only_the_last_part(model, expected):
    data = {"format": "imagefolder", "root": "/home/me/flowers", "resize": 64}
    recipe = parse_recipe({"name": "tiny", "model": model, "data": data, "ptq": [{"name": "a"}]})
    assert without_places(recipe) == {
        "name": "tiny",
        "model": expected,
        "data": data | {"root": "flowers"},
        "ptq": [{"name": "a"}],
    }
