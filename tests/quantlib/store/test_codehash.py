import textwrap

import pytest

from quantlib.store import codehash


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes modules of an importable project; returns a fresh hash of one of them."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))

    def hashes(name):
        codehash.module_hashes.cache_clear()
        return codehash.module_hashes(name)

    return write, hashes


def test_a_comment_a_docstring_or_a_blank_line_changes_nothing(project):
    write, hashes = project
    write(
        one="""
        def f(x):
            return x + 1
    """
    )
    before = hashes("one")
    write(
        one='''
        """A docstring."""

        # A comment.
        def f(x):
            """Another."""

            return (x +
                    1)  # and one more
    '''
    )
    assert hashes("one") == before


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x + 2", "def f(y):\n    return y + 1", "def f(x):\n    return x - 1"]
)
def test_a_change_of_code_changes_the_hash(text, project):
    write, hashes = project
    write(one="def f(x):\n    return x + 1")
    before = hashes("one")
    write(one=text)
    assert hashes("one") != before


def test_what_is_imported_through_others_counts_also_inside_functions(project):
    write, hashes = project
    write(one="import two", two="def f():\n    from three import g", three="g = 1", four="import one")
    assert set(hashes("one")) == {"one", "two", "three"}


def test_what_is_imported_for_types_alone_does_not_count(project):
    write, hashes = project
    write(
        one="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import two\nelse:\n    import three",
        two="",
        three="",
    )
    assert set(hashes("one")) == {"one", "three"}


def test_relative_imports_and_the_packages_of_a_module_count(project, tmp_path):
    _, hashes = project
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("version = 1")
    (package / "a.py").write_text("from . import b\nfrom .c import name")
    (package / "b.py").write_text("")
    (package / "c.py").write_text("name = 1")
    assert set(hashes("package.a")) == {"package", "package.a", "package.b", "package.c"}


def test_what_is_installed_does_not_count_for_a_project_of_ones_own(project):
    write, hashes = project
    write(one="import torch\nimport json\nimport numpy.linalg")
    assert set(hashes("one")) == {"one"}


def test_nothing_is_imported_to_hash_it(project):
    write, hashes = project
    write(one="raise RuntimeError('imported')")
    assert set(hashes("one")) == {"one"}


def test_a_module_that_is_not_there_is_an_error(project):
    _, hashes = project
    with pytest.raises(ModuleNotFoundError):
        hashes("no_such_module")
    with pytest.raises(ModuleNotFoundError):
        hashes("quantlib.no_such_module")
