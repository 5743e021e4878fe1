"""Exported models in every runtime, and the loader."""

import os
import subprocess
import sys

import pytest
import torch
import traces
from schemes import scheme

from quantlib import api
from quantlib.data import shards
from quantlib.errors import MachineError, ModelError
from quantlib.export import executorch, onnx, onnx_draft, scripting, torch_export
from quantlib.quantize import conversion
from quantlib.runtimes import available, classifiers

SHAPE = (3, 32, 32)
ONNX_RUNTIMES = [found.name for found in available.find_runtimes()]
NAMED = [name for name in ("torch_export", "executorch") if available.is_installed(name)]


@pytest.fixture(scope="module")
def exported(calibrated, fused_model, engine, tmp_path_factory):
    """A folder with int8.pt, int8.onnx, int8.pt2, float.pt, and int8.pte if ExecuTorch is installed."""
    pytest.importorskip("onnx", reason="the extra of an ONNX runtime is not installed")
    folder = tmp_path_factory.mktemp("files")
    int8 = conversion.convert(calibrated("accurate"), scheme("accurate"))
    (folder / "int8.pt").write_bytes(scripting.script(int8, engine, SHAPE))
    (folder / "float.pt").write_bytes(scripting.script(fused_model, None, SHAPE))
    (folder / "int8.pt2").write_bytes(torch_export.write(int8, SHAPE))
    if "executorch" in NAMED:
        (folder / "int8.pte").write_bytes(executorch.write(int8, SHAPE))
    draft = onnx_draft.draft(fused_model, SHAPE)
    # Everything is rounded that the TorchScript file rounds; every runtime takes it.
    (folder / "int8.onnx").write_bytes(onnx.write_onnx(draft, int8, "onnxruntime"))
    return folder


def _error(got, expected):
    return float((got - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_runtime_gives_the_logits_of_the_torchscript_file(exported, val_inputs, engine, layout):
    expected = classifiers.open_model(exported / "int8.pt", f"torchscript-{engine}")(val_inputs)
    x = val_inputs.contiguous(memory_format=layout)
    supported = set(torch.backends.quantized.supported_engines)
    for name in (f"torchscript-{engine}" for engine in available.engines() if engine in supported):
        assert _error(classifiers.open_model(exported / "int8.pt", name)(x), expected) < 0.02, name
    for name in (*ONNX_RUNTIMES, *NAMED):
        model = classifiers.open_model(exported / f"int8{available.suffix_of(name)}", name, num_threads=1)
        assert _error(model(x), expected) < 0.02, name
        # Outputs belong to the caller: the next call leaves them as they are, and takes another number of images.
        first = model(x[:5])
        kept = first.clone()
        model(x[5:])
        assert torch.equal(first, kept)
        assert first.shape == (5, 3)


def test_a_frozen_float_file_computes_the_same(exported, fused_model, val_inputs):
    with torch.inference_mode():
        expected = fused_model(val_inputs)
    torch.testing.assert_close(classifiers.open_model(exported / "float.pt", "torchscript")(val_inputs), expected)


@pytest.mark.parametrize("runtime", ["torchscript", *ONNX_RUNTIMES, *NAMED])
@pytest.mark.parametrize("named", [True, False])
def test_the_loader_takes_what_the_report_names(exported, val_inputs, runtime, named):
    name = f"int8{available.suffix_of(runtime)}"
    threads = torch.get_num_threads()
    model = api.load(str(exported / name), runtime if named else None, num_threads=1)
    assert model(val_inputs).shape == (len(val_inputs), 3)
    assert torch.get_num_threads() == threads == 1


def test_the_loader_says_what_is_wrong(exported, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"No file .*give one that a run's report names"):
        api.load(tmp_path / "none.pt")
    with pytest.raises(
        MachineError, match=r"Runtime 'tensorrt' is unknown: torchscript-ENGINE, .*torch_export are allowed"
    ):
        api.load(exported / "int8.pt", "tensorrt")
    with pytest.raises(MachineError, match=r"Runtime 'openvino-x86' is unknown"):
        api.load(exported / "int8.onnx", "openvino-x86")
    with pytest.raises(MachineError, match=r"Engine 'neon' is not available"):
        api.load(exported / "int8.pt", "torchscript-neon")
    with pytest.raises(ModelError, match=r"does not load in torchscript.*an \.onnx file ONNX, an \.xml file"):
        api.load(exported / "int8.onnx", "torchscript")
    (tmp_path / "half.pt").write_bytes((exported / "int8.pt").read_bytes()[:5000])
    with pytest.raises(ModelError, match="does not load in torchscript"):
        api.load(tmp_path / "half.pt")
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MachineError, match="pip install openvino"):
        api.load(exported / "int8.onnx")


def test_without_the_package_that_writes_onnx_there_are_no_runtimes(monkeypatch):
    found = available.importlib.util.find_spec
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None if name == "onnx" else found(name))
    assert available.find_runtimes() == ()
    assert [found.name for found in available.find_runtimes(("torch_export",))] == ["torch_export"]


@pytest.mark.parametrize(
    ("wanted", "shipped_for"),
    [(("torch_export",), None), (None, ("torch_export",)), (("torch_export",), ("torchscript",))],
)
def test_torch_export_is_used_only_where_a_recipe_names_it_and_then_nothing_else(wanted, shipped_for):
    assert [found.name for found in available.find_runtimes(wanted, shipped_for)] == ["torch_export"]
    assert "torch_export" not in ONNX_RUNTIMES


def test_executorch_is_used_only_where_a_recipe_names_it_and_asked_for_by_its_extra(monkeypatch):
    found = available.importlib.util.find_spec
    monkeypatch.setattr(
        available.importlib.util, "find_spec", lambda name: None if name == "executorch" else found(name)
    )
    with pytest.raises(
        MachineError, match=r"names executorch, which is not installed: pip install 'quantflow\[executorch\]',"
    ):
        available.find_runtimes(("executorch",))
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(available.importlib.metadata, "version", lambda _: "1.0")
    assert [each.name for each in available.find_runtimes()] == ["openvino", "onnxruntime"]
    assert [each.name for each in available.find_runtimes(("executorch", "torch_export"))] == [
        "executorch",
        "torch_export",
    ]


def test_a_recipe_names_the_runtimes_that_it_wants(monkeypatch):
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None if name == "openvino" else name)
    monkeypatch.setattr(available.importlib.metadata, "version", lambda _: "1.0")
    assert available.find_runtimes(("torchscript",)) == ()
    assert [found.name for found in available.find_runtimes(("onnxruntime",))] == ["onnxruntime"]
    assert [found.name for found in available.find_runtimes()] == ["onnxruntime"]
    with pytest.raises(
        MachineError, match=r"names openvino, which is not installed: pip install 'quantflow\[openvino\]',"
    ):
        available.find_runtimes(("torchscript", "openvino"))


def test_logits_of_real_images_in_shards(exported, val_shard, engine):
    x = shards.open_shard(val_shard).inputs()
    logits = classifiers.open_model(exported / "int8.pt", "torchscript")(x)
    assert logits.isfinite().all()
    assert not logits.requires_grad


_OPENED = """
import sys, time, warnings
warnings.simplefilter("ignore")
import torch
from quantlib import api
for runtime in sys.argv[3:]:
    api.load(sys.argv[2], runtime)(torch.zeros(1, 3, 32, 32))
time.sleep(float(sys.argv[1]))
print([name for name, module in sys.modules.items() if "telemetry" in name and hasattr(module, "Telemetry")])
"""


def _opened(exported, home, seconds):
    """A command that loads a file in every runtime, then waits; and its environment, with an empty home."""
    home.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    command = [sys.executable, "-c", _OPENED, str(seconds), str(exported / "int8.onnx"), *ONNX_RUNTIMES]
    return command, own | {"HOME": str(home)}


def test_no_runtime_loads_what_reports_to_its_maker_nor_writes_to_the_users_home(exported, tmp_path):
    command, environment = _opened(exported, tmp_path / "home", 0)
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    # OpenVINO brings its own stand-in for when telemetry is not installed.
    assert done.stdout.strip() in {"[]", "['openvino.tools.ovc.telemetry_stub']"}
    assert list((tmp_path / "home").rglob("*")) == []


@pytest.mark.slow
@pytest.mark.skipif(traces.MISSING is not None, reason=str(traces.MISSING))
def test_no_runtime_reports_to_its_maker_later_either(exported, tmp_path):
    # ONNX Runtime waits a few seconds before it reports.
    command, environment = _opened(exported, tmp_path / "home", 30)
    seen = traces.trace(command, tmp_path / "trace", env=environment)
    assert seen.returncode == 0, seen.said
    assert seen.foreign() == []
    assert list((tmp_path / "home").rglob("*")) == []
    assert any("int8.onnx" in line for line in seen.calls), "nothing was traced"
