"""The machine a run computes on."""

import platform
from pathlib import Path

import pytest

from quantlib import machine
from quantlib.errors import MachineError
from quantlib.runtimes import available


def test_the_cpu_has_a_name():
    assert machine.cpu_model().strip()


def test_the_cpu_has_a_name_where_the_kernel_gives_none(monkeypatch):
    def unreadable(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unreadable)

    assert machine.cpu_model().strip()


def test_auto_is_the_engine_that_torch_prefers_on_this_kind_of_cpu(monkeypatch):
    for name, engine in (("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "qnnpack"), ("arm64", "qnnpack")):
        monkeypatch.setattr(platform, "machine", lambda name=name: name)
        assert available.find_engine("auto") == engine
        assert available.find_engine(engine) == engine


def test_an_engine_of_this_machine_is_itself_and_another_is_refused():
    assert available.find_engine("qnnpack") == "qnnpack"
    with pytest.raises(MachineError, match="'cudnn' is not available"):
        available.find_engine("cudnn")


def test_keeping_freed_memory_is_no_error_without_glibc(monkeypatch):
    machine.keep_freed_memory()

    def missing(_):
        raise OSError("libc.so.6: cannot open shared object file")

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    machine.keep_freed_memory()
