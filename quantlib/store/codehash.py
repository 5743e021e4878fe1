"""Hashes of Python code that ignore comments, docstrings and layout.

A stage's key holds the hash of the code that does its work, so editing it makes the stage compute again.
"""

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path


def hash_tree(tree: ast.AST) -> str:
    """Hash of a syntax tree without its docstrings."""
    return hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()


def imported_modules(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Names that a syntax tree imports, anywhere in it; for `from a import b`, both a and a.b.

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

    Nothing is imported except what is needed to find the first module.

    Args:
        name: Dotted. The same project is everything below the folder that holds its top-level package; for an
            installed module, everything in the same top-level package.

    Raises:
        ModuleNotFoundError: If there is no such module.
    """
    top = name.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    folder = Path(spec.origin).parents[bool(spec.submodule_search_locations)]
    if _source(folder, name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    installed = "site-packages" in folder.parts
    hashes: dict[str, str] = {}
    waiting = [name]
    while waiting:
        module = waiting.pop()
        source = _source(folder, module)
        if module in hashes or source is None or (installed and module.partition(".")[0] != top):
            continue
        parent = module.rpartition(".")[0]
        package, status = module if source.name == "__init__.py" else parent, source.stat()
        hashes[module], imported = _look_into(source, package, status.st_mtime_ns, status.st_size)
        waiting += imported
        # Importing a module runs the packages that contain it.
        waiting += [parent] if parent else []
    return hashes


@functools.cache  # Most modules are imported by many stages' modules.
def _look_into(source: Path, package: str, changed_ns: int, size: int) -> tuple[str, list[str]]:  # noqa: ARG001
    """The hash of a module as it is now, and what it imports."""
    tree = ast.parse(source.read_bytes())
    return hash_tree(tree), list(imported_modules(tree, package))


def _source(folder: Path, module: str) -> Path | None:
    """The file of a module below a folder, or None."""
    place = folder.joinpath(*module.split("."))
    return next(
        (path for path in (place / "__init__.py", place.with_name(f"{place.name}.py")) if path.is_file()),
        None,
    )


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
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(
            body, list
        ):
            node.body = [
                line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
    return tree
