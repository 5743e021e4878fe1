"""Rules for the repository as a whole."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

PACKAGES = ("flows", "tasks", "quantlib")
ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py"))

# Where torch's own quantization can be imported from.
_QUANTIZATION = re.compile(r"torch\.(ao|quantization|nn\.(quantized|qat|intrinsic))\b")
# Joined from parts, so that this file does not contain what it looks for.
_REGISTRIES = re.compile(
    "|".join(
        ("pypi" + r"\.(org|python)", "pythonhosted" + r"\.org", r"download\." + "pytorch", "--(extra-)?" + "index-url")
    )
)
_MACHINE_PATHS = re.compile(
    r"(?<![\w.~}>)-])/(" + "|".join(("work", "root", "tmp")) + r")(?=[/\"'`\s,;:)]|$)", re.MULTILINE
)


def _name(path):
    return str(path.relative_to(ROOT))


def _mentioned(tree):
    """Dotted names that code imports or uses, not those in comments and strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_only_the_native_export_and_what_registers_operations_touch_torchs_quantization(path):
    uses = [name for name in _mentioned(ast.parse(path.read_text())) if _QUANTIZATION.match(name)]

    assert not uses or _name(path) in {"quantlib/export/native.py", "quantlib/models/quantized_decomposed.py"}, uses


@pytest.mark.parametrize(
    "statement",
    [
        "import torch.ao.quantization as tq",
        "from torch import ao",
        "from torch.ao.nn import quantized as nnq",
        "torch.quantization.convert(m)",
    ],
)
def test_each_way_to_touch_torchs_quantization_is_seen(statement):
    assert any(_QUANTIZATION.match(name) for name in _mentioned(ast.parse(statement)))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "quantlib")], ids=_name)
def test_everything_public_in_quantlib_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    public = [
        node
        for parent in ast.walk(tree)
        if isinstance(parent, ast.Module | ast.ClassDef)
        for node in parent.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]

    assert ast.get_docstring(tree)
    assert [node.name for node in public if ast.get_docstring(node) is None] == []


def _kept_files():
    """Files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.parametrize(
    "pattern", [pytest.param(_REGISTRIES, id="registry"), pytest.param(_MACHINE_PATHS, id="path of a machine")]
)
def test_no_file_names_a_package_registry_or_a_place_on_one_machine(pattern):
    found = []
    for path in _kept_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{_name(path)}:{number}: {line.strip()}")

    assert found == []


@pytest.mark.parametrize("line", ["cd /{}/main", 'open("/{}/x")', "FILE=/{}/", "at /{}"])
@pytest.mark.parametrize("folder", ["tmp", "work", "root"])
def test_a_place_on_one_machine_is_seen(line, folder):
    assert _MACHINE_PATHS.search(line.format(folder))
    assert not _MACHINE_PATHS.search(f"data/{folder}/images")
