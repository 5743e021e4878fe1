"""Where a split of an image folder is, by name alone."""

from pathlib import Path

from quantlib.data.split import SplitName

_NAMES: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation", "test")}


def split_folder(root: Path, split: SplitName) -> Path:
    """The folder that holds a split: root/train; and the first of val, valid, validation and test that there is."""
    folders = [root / name for name in _NAMES[split]]
    return next((folder for folder in folders if folder.is_dir()), folders[0])
