"""The machine a run computes on."""

import platform
from dataclasses import replace
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


CPUINFO = {
    "vnni": "flags : fpu avx2 avx512f avx512_vnni",
    "avx2": "flags : fpu avx2",
    "arm": "Features : fp asimd asimddp i8mm",
}


def on(cpu, monkeypatch):
    """This machine, with another CPU."""
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *rest, **named: CPUINFO[cpu] if path.name == "cpuinfo" else read(path, **named)
    )
    return available.this_machine()


def test_a_file_runs_differently_on_a_cpu_with_other_int8_instructions(monkeypatch):
    vnni, avx2, arm = (on(cpu, monkeypatch) for cpu in CPUINFO)
    assert [cpu.instructions for cpu in (vnni, avx2, arm)] == ["avx2 avx512_vnni avx512f", "avx2", "asimddp i8mm"]
    assert [cpu.activation_bits("x86") for cpu in (vnni, avx2)] == [8, 7]
    for runtime in (vnni.torch_runtime("onednn"), vnni.torch_runtime(None), *vnni.runtimes):
        assert vnni.has(runtime)
        assert not avx2.has(runtime)
    assert not vnni.has(replace(vnni.torch_runtime(None), version="2.0"))
    assert vnni.torch_runtime("onednn").engine == "onednn"
    assert vnni.torch_runtime(None).engine is None


def test_a_runtime_that_another_machine_lacks_is_an_error_that_names_the_machine():
    machine = replace(available.this_machine(), name="worker-3", runtimes=())
    assert machine.find_runtimes() == ()
    with pytest.raises(MachineError, match="names openvino, which is not installed on worker-3: pip install"):
        machine.find_runtimes(("openvino",))
