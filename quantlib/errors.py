"""The errors a user can cause, and so can mend.

Each message says what was got, what is allowed and what to do.

    QuantflowError
    ├── RecipeError      the recipe is wrong: a key, a value, a combination
    ├── DataError        the dataset is missing, inconsistent or unreadable
    ├── ModelError       the architecture or its weights do not fit
    ├── MachineError     this machine lacks what was asked for: an engine, disk space, a download
    └── StoreError       an artifact is missing or damaged
"""

import difflib
from collections.abc import Iterable


class QuantflowError(Exception):
    """Base of every error that quantflow raises on purpose."""


class RecipeError(QuantflowError):
    """The recipe is wrong: an unknown key, a value out of range, a combination that cannot work."""


class DataError(QuantflowError):
    """The dataset is missing, inconsistent or unreadable."""


class ModelError(QuantflowError):
    """The architecture or its weights do not fit the recipe."""


class MachineError(QuantflowError):
    """This machine lacks what was asked for: an engine, disk space, a download."""


class StoreError(QuantflowError):
    """An artifact is missing from the store, or is not what was written."""


def suggest(got: str, allowed: Iterable[str]) -> str:
    """The end of a sentence, with the nearest of `allowed` where one is near."""
    nearest = difflib.get_close_matches(got, list(allowed), n=1)
    return f" (did you mean {nearest[0]!r}?)." if nearest else "."
