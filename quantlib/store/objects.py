"""What a shared store consists of: named objects that many machines write.

    blobs/ab/abcdef…     an artifact; every writer writes the same bytes
    records/KEY          what the stage with this key made, and from what
    leases/KEY           which machine computes the stage now
    runs/RUN             what a run uses, and whether it is still going

All but artifacts are small, of unique content, and have versions: they are written only where none is, or in place of
a known version.
"""

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from quantlib.errors import MachineError

# Enough to reveal a server that looks first and then writes.
_NUM_PROBES = 8


@dataclass(frozen=True)
class Found:
    """A small object as it was read."""

    content: bytes
    version: Any
    """What `replace` compares; never None."""


class Listed(NamedTuple):
    """An object in a list."""

    name: str
    size: int
    """Bytes."""


class Objects(Protocol):
    """A server or a folder that holds the objects.

    Every method raises MachineError, which names the place, if it gets no answer for too long or is refused.
    """

    place: str
    """Where it is, for messages."""

    def get(self, name: str) -> Found | None:
        """A small object, or None if there is none."""

    def create(self, name: str, content: bytes) -> Any:
        """Write a small object where there is none.

        Returns:
            Its version; None if another object stands there now, perhaps after this one.
        """

    def replace(self, name: str, content: bytes, version: Any) -> Any:
        """Write a small object in place of the version that was read.

        Returns:
            Its version; None if another one stands there now, perhaps after this one.
        """

    def size(self, name: str) -> int | None:
        """Bytes of an artifact, or None if there is none."""

    def upload(self, name: str, path: Path) -> None:
        """Write an artifact from a file; others see all of it or nothing."""

    def download(self, name: str, size: int) -> Iterator[bytes]:
        """Read an artifact in pieces.

        Raises:
            FileNotFoundError: If there is none.
        """

    def list(self, folder: str) -> Iterator[Listed]:
        """All objects below a folder, in no particular order."""

    def delete(self, name: str) -> None:
        """Delete an object, if there is one."""

    def impatient(self) -> "Objects":
        """The same place, asked once: no answer is an error after some seconds."""


def check_conditions(objects: Objects) -> None:
    """Let writers race for one object, and check that each time exactly one is told that it won.

    Raises:
        MachineError: If the place cannot be written to, or ignores the conditions of writes.
    """
    name = f"probes/{secrets.token_hex(8)}"
    contents = [bytes([number]) for number in range(_NUM_PROBES)]
    with ThreadPoolExecutor(_NUM_PROBES) as pool:
        created = list(pool.map(lambda content: objects.create(name, content), contents))
        found = objects.get(name)
        version = found.version if found is not None else None
        replaced = list(pool.map(lambda content: objects.replace(name, b"again" + content, version), contents))
    objects.delete(name)
    num_winners = [sum(version is not None for version in versions) for versions in (created, replaced)]
    if num_winners != [1, 1] or found is None or created[found.content[0]] is None:
        raise MachineError(
            f"The shared store {objects.place} ignores the conditions of writes (If-None-Match, If-Match): of "
            f"{_NUM_PROBES} writers at once, {num_winners[0]} created one and the same object and {num_winners[1]} "
            "replaced it. Machines would overwrite each other's results there: use a server that has conditional "
            "writes, or a folder on a shared file system."
        )
