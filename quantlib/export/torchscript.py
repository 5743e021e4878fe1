"""TorchScript files whose bytes depend on the model alone.

torch.jit.save lets the process's history into the file: the numbers that distinguish classes of the same name count
every model scripted so far, constants come in the order of a Python set, and debug records hold this machine's
paths. A resumed run would give different bytes from an uninterrupted one.
"""

import re
from collections.abc import Iterable

import torch

from quantlib.export import archive

_MANGLED = re.compile(rb"___torch_mangle_(\d+)")
_FINAL = re.compile(rb"(?:^  \w+ : Final\[.*\n)+", re.MULTILINE)


def forget_classes() -> None:
    """Make torch script the next model as if it were the process's first, except for its classes' numbers.

    torch's own tests do this between tests (torch.testing._internal.jit_utils.clear_class_registry).
    """
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()


def canonical(content: bytes) -> bytes:
    """The same TorchScript file, with classes numbered by first use, constants sorted, and no debug records."""
    records = {name: record for name, record in archive.read(content).items() if not name.endswith(".debug_pkl")}
    # data.pkl names every class in the order of the modules, which is the same each time.
    numbers = _first_uses([records["data.pkl"], *(records[name] for name in sorted(records, key=_without_numbers))])
    return archive.write(
        {
            _renumber(name.encode(), numbers).decode(): _rewrite(name, record, numbers)
            for name, record in records.items()
        }
    )


def _rewrite(name: str, record: bytes, numbers: dict[bytes, bytes]) -> bytes:
    if name.endswith(".py"):
        return _FINAL.sub(_sort_lines, _renumber(record, numbers))
    # Class names in a pickle end with a line break and carry no length, so they can get longer or shorter.
    return _renumber(record, numbers) if name.endswith(".pkl") else record


def _first_uses(texts: Iterable[bytes]) -> dict[bytes, bytes]:
    numbers: dict[bytes, bytes] = {}
    for text in texts:
        for number in _MANGLED.findall(text):
            numbers.setdefault(number, str(len(numbers)).encode())
    return numbers


def _renumber(text: bytes, numbers: dict[bytes, bytes]) -> bytes:
    return _MANGLED.sub(lambda found: b"___torch_mangle_" + numbers.get(found[1], found[1]), text)


def _sort_lines(found: re.Match[bytes]) -> bytes:
    return b"".join(sorted(found[0].splitlines(keepends=True)))


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)
