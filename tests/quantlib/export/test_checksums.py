"""SHA256SUMS beside shipped files: a file that differs from what was written is not loaded."""

import shutil
import subprocess

import pytest

from quantlib import api
from quantlib.errors import ModelError
from quantlib.export import checksums


@pytest.fixture
def shipped(undisturbed, tmp_path):
    """A copy of the folder with a run's files."""
    (folder,) = (undisturbed[0] / "models").iterdir()
    return shutil.copytree(folder, tmp_path / "shipped")


def test_a_runs_files_all_have_their_sum(shipped):
    files = {path.name for path in shipped.iterdir()} - {"SHA256SUMS"}
    assert {"float.onnx", "qat.pt"} <= files
    assert {line.split()[1] for line in (shipped / "SHA256SUMS").read_text().splitlines()} == files
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=shipped, check=True, capture_output=True)
    assert api.load(shipped / "qat.onnxruntime.onnx") is not None


@pytest.mark.parametrize("name", ["qat.onnxruntime.onnx", "float.pt"])
def test_a_file_with_one_bit_changed_is_not_loaded(shipped, name):
    content = bytearray((shipped / name).read_bytes())
    content[len(content) // 2] ^= 1
    (shipped / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} is damaged: its SHA-256 is .*Copy it again"):
        api.load(shipped / name)


def test_a_file_that_was_taken_along_alone_is_loaded_as_it_is(shipped):
    (shipped / "SHA256SUMS").unlink()
    assert api.load(shipped / "qat.onnxruntime.onnx") is not None


@pytest.mark.parametrize("sums", [b"", b"\xff\xfe", b"one\n\ntwo three four\n"])
def test_a_list_without_the_file_says_nothing_of_it(shipped, sums):
    (shipped / "SHA256SUMS").write_bytes(sums)
    checksums.verify(shipped / "qat.onnxruntime.onnx")
