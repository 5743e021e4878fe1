"""SHA256SUMS next to the files to ship, as `sha256sum --check` reads it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from quantlib.errors import ModelError
from quantlib.files import read_file, write_atomically

_NAME = "SHA256SUMS"


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the checksums of a folder's files: hexadecimal SHA-256 by file name."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    write_atomically(folder / _NAME, "".join(lines).encode())


def listed(folder: Path) -> list[Path]:
    """The files that a folder's checksums are of, by name; empty if it has none."""
    try:
        lines = read_file(folder / _NAME).decode().splitlines()
    except (OSError, ValueError):
        return []
    return sorted(folder / name for _, _, name in (line.partition("  ") for line in lines) if name)


def verify(path: Path) -> None:
    """Check a file against the checksum next to it, if there is one; of OpenVINO IR, NAME.xml, its weights, too.

    Raises:
        ModelError: If it is not the file that was written.
    """
    if path.suffix == ".xml":
        verify(path.with_suffix(".bin"))
    try:
        lines = read_file(path.with_name(_NAME)).decode().splitlines()
        expected = next((line.split()[0] for line in lines if line.split()[1:] == [path.name]), None)
        digest = None if expected is None else hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, ValueError):
        return  # The file was copied without the list, or cannot be read, which whoever loads it reports better.
    if digest != expected:
        raise ModelError(
            f"{path} is damaged: its SHA-256 is {digest}, but {_NAME} next to it says {expected}. Copy it again, or "
            "run its recipe again; if you changed it yourself, remove it from that list."
        )
