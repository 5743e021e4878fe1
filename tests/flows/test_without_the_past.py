"""What PyTorch has announced to remove may be gone: a run for ONNX Runtime needs none of it."""

import subprocess
import sys

import pytest
from dashboard_driver import TINY, own_environment

from quantlib.report import tables

CHANGES = ('benchmark.runtimes=["onnxruntime"]', "evaluation.simulate=true", "gate.min_speedup=0")

# Loaded before anything of quantflow. torch itself still needs the module torch.jit, but not what users call of it.
WITHOUT = """
import importlib.abc, sys
import torch

GONE = ("torch.ao.quantization", "torch.ao.nn", "torch.quantization")

class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(GONE):
            raise ImportError(f"{name} is gone")

for name in [name for name in sys.modules if name.startswith(GONE)]:
    del sys.modules[name]
sys.meta_path.insert(0, Gone())
for name in ("quantization", "nn"):
    torch.ao.__dict__.pop(name, None)
for name in ("script", "trace", "load", "save", "freeze", "optimize_for_inference"):
    delattr(torch.jit, name)

from flows.cli.commands import command
command()
"""


def test_a_run_for_onnx_runtime_calibrates_trains_writes_and_verifies(tmp_path):
    pytest.importorskip("onnxruntime", reason="the run is for ONNX Runtime")
    (tmp_path / "tiny.toml").write_text(TINY)
    changes = [part for change in CHANGES for part in ("--set", change)]
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, "run", "tiny.toml", "--home", "home", *changes],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=own_environment(OMP_NUM_THREADS="1"),
    )
    assert ended.returncode == 0, ended.stderr
    rows = [row for _, row in tables.read_variants(tmp_path / "home" / "reports")]
    assert [row.variant for row in rows] == ["float", "minmax", "qat"]
    for row in rows:
        assert (row.torchscript_path, row.torchscript_refusal) == (None, None)
        assert row.runtime == "onnxruntime"
        assert row.artifact_path.endswith(".onnx")
        assert row.onnx_refusal is None
    assert all(row.top1_simulated is not None for row in rows[1:])
