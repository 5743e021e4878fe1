"""SHA256SUMS beside the files that are shipped, as `sha256sum --check` reads it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from quantlib.errors import ModelError
from quantlib.files import read_file, write_atomically

_NAME = "SHA256SUMS"


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the sums of a folder's files: SHA-256 in hexadecimal by name."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    write_atomically(folder / _NAME, "".join(lines).encode())


def verify(path: Path) -> None:
    """Compare a file with the sum beside it, where there is one.

    Raises:
        ModelError: If it is another file than was written.
    """
    try:
        lines = read_file(path.with_name(_NAME)).decode().splitlines()
        expected = next((line.split()[0] for line in lines if line.split()[1:] == [path.name]), None)
        digest = None if expected is None else hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, ValueError):
        return  # The file was taken along alone, or cannot be read, which whoever loads it says better.
    if digest != expected:
        raise ModelError(
            f"{path} is damaged: its SHA-256 is {digest}, and {_NAME} beside it says {expected}. Copy it again, or run "
            "its recipe again; where you have changed it yourself, remove it from that list."
        )
