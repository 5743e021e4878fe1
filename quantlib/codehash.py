"""Hashes of Python code that comments, docstrings and layout do not change.

A stage's key holds the hash of the code that does its work, so that editing it computes the stage again.
"""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path


def hash_tree(tree: ast.AST) -> str:
    """Of a syntax tree, without its docstrings."""
    return hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()


def imported_modules(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Names that a syntax tree imports, wherever in it; of `from a import b`, both a and a.b.

    Imports under `if TYPE_CHECKING:` are left out: they do not run.

    Args:
        tree: A module, or a part of one.
        package: What relative imports start from.
    """
    for node in _running_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@functools.cache
def module_hashes(name: str) -> dict[str, str]:
    """A hash for a module, and for each module of the same project that it imports, directly or through others.

    Args:
        name: Dotted. Of the same project is what lies below the folder that its top-level package lies in, but
            for what is installed; for an installed module, what lies in the same top-level package.

    Raises:
        ModuleNotFoundError: If there is no such module.
    """
    first = _source(name)
    if first is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    top = name.partition(".")[0]
    folder = first.parents[name.count(".") + (first.name == "__init__.py")]
    installed = _is_installed(first)
    hashes: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in hashes or (installed and module.partition(".")[0] != top):
            continue
        source = _source(module)
        if source is None or not source.is_relative_to(folder) or (not installed and _is_installed(source)):
            continue
        tree = ast.parse(source.read_bytes())
        hashes[module] = hash_tree(tree)
        package = module if source.name == "__init__.py" else module.rpartition(".")[0]
        waiting += imported_modules(tree, package)
        # Importing a module runs the packages that it lies in.
        waiting += [module.rpartition(".")[0]] if "." in module else []
    return hashes


def _source(name: str) -> Path | None:
    """The file of a module; None for what is no module, or is not written in Python."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _is_installed(source: Path) -> bool:
    return "site-packages" in source.parts


def _running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                yield branch
                yield from _running_nodes(branch)
        else:
            yield from _running_nodes(node)


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        # Also the strings below attributes, which are their docstrings.
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(body, list):
            node.body = [
                line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree
