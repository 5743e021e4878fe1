"""The ZIP archives that torch writes: TorchScript files, and those of torch.export."""

import io
from collections.abc import Mapping

import torch

_EXTRA = "extra/"  # Where torch puts a file's extra files.
# The writer adds these itself.
_WRITTEN_BY_TORCH = ("version", "byteorder", ".data/serialization_id")


def read(content: bytes) -> dict[str, bytes]:
    """The records of a file, by name, without those that its writer adds itself.

    Raises:
        RuntimeError: If it is no such file, or is damaged.
    """
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    return {name: reader.get_record(name) for name in reader.get_all_records() if name not in _WRITTEN_BY_TORCH}


def write(records: Mapping[str, bytes]) -> bytes:
    """A file with these records; the same records give the same bytes."""
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name in sorted(records):
        writer.write_record(name, records[name], len(records[name]))
    writer.write_end_of_file()
    return buffer.getvalue()


def add_extra_file(content: bytes, name: str, extra: bytes) -> bytes:
    """A file with an extra file added, as `_extra_files` of torch.jit.save or `extra_files` of torch.export.save are.

    Loading and saving a TorchScript file would pack its weights for this machine's engine; here they stay as they are.
    """
    return write(read(content) | {f"{_EXTRA}{name}": extra})


def find_extra_file(content: bytes, name: str) -> bytes | None:
    """One of the extra files of a file, without loading its model; None if it has none of that name.

    Raises:
        RuntimeError: If it is no such file, or is damaged.
    """
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    record = f"{_EXTRA}{name}"
    return reader.get_record(record) if record in reader.get_all_records() else None
