"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), in units that the caller is told."""


def silent(done: int, total: int) -> None:
    """Progress that nobody is told of."""
