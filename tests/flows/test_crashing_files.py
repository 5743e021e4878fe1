"""A file whose native kernels crash is refused, and the run ends with a verdict about the others."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
from crashing import Crashing
from dashboard_driver import TINY, own_environment

from quantlib.report import tables
from quantlib.runtimes.available import engines

CHANGES = (
    'ptq=[{name = "ptq"}, {name = "minmax", qconfig = "default"}]',
    "qat=[]",
    'benchmark.runtimes=["torchscript", "onnxruntime"]',
    "gate.min_speedup=0",
)

# The first int8 model's TorchScript file is one that crashes, and the second's is taken for it on another engine.
CRASHING = """
from pathlib import Path
from quantlib import helper
from quantlib.export import scripting

write, run_file, crashes = scripting.script, helper.run_file, iter([True, False])
crashing = Path("crashing.pt")
scripting.script = lambda *given: crashing.read_bytes() if given[1] and next(crashes) else write(*given)
helper.run_file = lambda path, runtime, *rest: run_file(crashing if "onednn" in runtime else path, runtime, *rest)
"""
WITHOUT_HELPER = """
from quantlib import helper
helper._start = lambda: 1 / 0
"""
COMMAND = """
from flows.cli.commands import command
command()
"""


def test_a_crash_costs_one_file_or_one_engine_and_a_run_that_only_reuses_starts_no_helper(tmp_path):
    pytest.importorskip("onnxruntime", reason="the other file is for ONNX Runtime")
    (tmp_path / "tiny.toml").write_text(TINY)
    changes = [part for change in CHANGES for part in ("--set", change)]
    (tmp_path / "crashing.pt").write_bytes(torch.jit.script(Crashing()).save_to_buffer())
    (tmp_path / "tmp").mkdir()

    def run(prelude):
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", prelude + COMMAND, "run", "tiny.toml", "--home", "home", *changes],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env=own_environment(OMP_NUM_THREADS="1", TMPDIR=str(tmp_path / "tmp")),
        )
        assert ended.returncode == 0, ended.stderr
        assert "minmax was not timed in torchscript-onednn: The TorchScript file crashed with SIGSEGV" in ended.stdout

    run(CRASHING)
    rows = {row.variant: row for _, row in tables.read_variants(tmp_path / "home" / "reports")}
    assert rows["float"].torchscript_path is not None
    assert rows["ptq"].torchscript_path is None
    assert "TorchScript file crashed with SIGSEGV in torchscript-" in rows["ptq"].torchscript_refusal
    assert rows["ptq"].onnx_refusal is None
    assert (rows["minmax"].torchscript_refusal, rows["minmax"].onnx_refusal) == (None, None)
    times = pd.read_parquet(tmp_path / "home" / "reports" / "latency")
    runtimes = set(times[times.variant == "minmax"].runtime)
    assert runtimes == {"onnxruntime", *(f"torchscript-{name}" for name in engines() if name != "onednn")}

    run(WITHOUT_HELPER)
    # torch keeps a folder there for the next process.
    assert [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")] == []
