"""A split of a dataset, and a subset of its images, by what identifies them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

SplitName = Literal["train", "val"]


NOT_IN_KEY = {"in_key": False}
"""Metadata of a field that says where something is, not what it is."""


@dataclass(frozen=True)
class SplitInput:
    """One split of the dataset."""

    format: str
    name: SplitName
    root: str | None = field(metadata=NOT_IN_KEY)
    fingerprint: str
    """Hash of its files' names and contents, and of the code that reads them if that is the user's."""
    num_images: int
    classes: tuple[str, ...] = field(metadata=NOT_IN_KEY)
    num_skipped: int = field(default=0, metadata=NOT_IN_KEY)
    """Files among the images that are not images, or of a kind that is not read."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


@dataclass(frozen=True)
class Subset:
    """Some images of a split, in a fixed order."""

    split: SplitInput
    seed: int | None
    """Shuffles the split; None: the dataset's own order."""
    start: int
    """First position in that order."""
    stop: int
    """One past the last position."""

    def parts(self, size: int) -> tuple[Subset, ...]:
        """The same images in consecutive selections of at most `size`."""
        starts = range(self.start, self.stop, size)
        return tuple(replace(self, start=start, stop=min(start + size, self.stop)) for start in starts)
