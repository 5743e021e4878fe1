"""The documentation says what the code does."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference():
    """The script that writes the reference pages."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["recipe.md", "report.md"])
def test_the_reference_pages_are_what_the_schema_gives(name, reference):
    assert (ROOT / "docs" / name).read_text() == reference.pages()[name] + "\n", "write them again with `make docs`"


def test_a_column_or_key_without_a_description_is_an_error(reference):
    @dataclass
    class Row:
        told: int
        """Described."""
        untold: int

    with pytest.raises(ValueError, match=r"Row\.untold has no docstring: add one below it"):
        reference._docstrings(Row)
    with pytest.raises(ValueError, match="'untold' has no docstring"):
        reference._described({"type": "integer"}, "untold")
