"""How long-running work reports its progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), in units that the function taking it documents."""


def silent(done: int, total: int) -> None:
    """Report nothing."""
