"""TorchScript files whose bytes depend on the model alone.

torch.jit.save lets the process's history into the file: the numbers that distinguish classes of the same name count
every model scripted so far, constants come in the order of a Python set, and debug records hold this machine's
paths. A resumed run would give different bytes from an uninterrupted one.
"""

import io
import re
from collections.abc import Iterable

import torch

_MANGLED = re.compile(rb"___torch_mangle_(\d+)")
_FINAL = re.compile(rb"(?:^  \w+ : Final\[.*\n)+", re.MULTILINE)
_EXTRA = "extra/"  # Where torch.jit.save puts `_extra_files`.
# The writer adds these itself.
_WRITTEN_BY_TORCH = ("version", "byteorder", ".data/serialization_id")


def forget_classes() -> None:
    """Make torch script the next model as if it were the process's first, except for its classes' numbers.

    torch's own tests do this between tests (torch.testing._internal.jit_utils.clear_class_registry).
    """
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()


def canonical(content: bytes) -> bytes:
    """The same TorchScript file, with classes numbered by first use, constants sorted, and no debug records."""
    records = {name: record for name, record in _read(content).items() if not name.endswith(".debug_pkl")}
    # data.pkl names every class in the order of the modules, which is the same each time.
    numbers = _first_uses([records["data.pkl"], *(records[name] for name in sorted(records, key=_without_numbers))])
    return _write(
        {
            _renumber(name.encode(), numbers).decode(): _rewrite(name, record, numbers)
            for name, record in records.items()
        }
    )


def add_extra_file(content: bytes, name: str, extra: bytes) -> bytes:
    """A TorchScript file with one of `torch.jit.save`'s `_extra_files` added.

    Loading and saving it would pack the weights for this machine's engine; here they stay as they are.
    """
    return _write(_read(content) | {f"{_EXTRA}{name}": extra})


def find_extra_file(content: bytes, name: str) -> bytes | None:
    """One of the `_extra_files` of a TorchScript file, without loading its model; None if it has none of that name.

    Raises:
        RuntimeError: If it is no TorchScript file, or is damaged.
    """
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    record = f"{_EXTRA}{name}"
    return reader.get_record(record) if record in reader.get_all_records() else None


def _read(content: bytes) -> dict[str, bytes]:
    """The records of a file, without those that its writer adds itself."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    return {name: reader.get_record(name) for name in reader.get_all_records() if name not in _WRITTEN_BY_TORCH}


def _write(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name in sorted(records):
        writer.write_record(name, records[name], len(records[name]))
    writer.write_end_of_file()
    return buffer.getvalue()


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
