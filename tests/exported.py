"""Files of `torch.export.save` for tests."""

import io
import json
import zipfile

import torch
from torch.export import Dim, export, save


def write(model, path, *, images=None, any_number=True, decompose=False):
    """Export a model for images, 32 pixels wide by default, and save it."""
    images = torch.zeros(2 if any_number else 1, 3, 32, 32) if images is None else images
    program = export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},) if any_number else None)
    save(program.run_decompositions() if decompose else program, path)
    return str(path)


def read_json(path, name):
    """A JSON file of the archive, by the end of its name."""
    with zipfile.ZipFile(path) as archive:
        (found,) = (each for each in archive.namelist() if each.endswith(name))
        return json.loads(archive.read(found))


def alter(path, changes):
    """Replace files of the archive, or add them: content by the end of their name below its folder."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(contents)).partition("/")[0]
    for name, content in changes.items():
        contents[f"{root}/{name}"] = content if isinstance(content, bytes) else json.dumps(content).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    path.write_bytes(buffer.getvalue())
