"""The process that runs exported files: what it answers, and what becomes of it when something dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from crashing import Crashing
from dashboard_driver import until
from torch import nn

from quantlib import helper
from quantlib.data import shards
from quantlib.errors import MachineError, ModelError


class Means(nn.Module):
    """The mean of each channel."""

    def forward(self, x):
        return x.mean((2, 3))


class Hanging(nn.Module):
    """Never ends."""

    def forward(self, x):
        while bool(x.abs().sum() >= 0):
            x = x * 1
        return x


class Failing(nn.Module):
    """Raises an error."""

    def forward(self, x):
        return x.view(7, -1)


def script(folder, kind):
    """A TorchScript file of a module."""
    path = folder / f"{kind.__name__}.pt"
    path.write_bytes(torch.jit.script(kind().eval()).save_to_buffer())
    return path


def run(path, val_shard):
    return helper.run_file(path, "torchscript", val_shard, 4)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_file_gives_its_logits_for_the_first_images_and_one_helper_serves_many(tmp_path, val_shard):
    means = script(tmp_path, Means)
    first = run(means, val_shard)
    pid = helper._HELPER.process.pid
    second = run(means, val_shard)
    assert helper._HELPER.process.pid == pid != os.getpid()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, shards.open_shard(val_shard).inputs(stop=4).mean((2, 3)))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_file_that_a_runtime_cannot_read_is_refused_with_its_message(tmp_path, val_shard, name):
    pytest.importorskip(name)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(
        ModelError,
        match=rf"model\.onnx does not load in {name}: \S.* an \.onnx file ONNX, an \.xml file OpenVINO IR, ",
    ):
        helper.run_file(tmp_path / "model.onnx", name, val_shard, 4)


def test_an_error_is_told_and_the_helper_lives(tmp_path, val_shard):
    run(script(tmp_path, Means), val_shard)
    pid = helper._HELPER.process.pid
    with pytest.raises(
        ModelError, match=r"TorchScript file does not run in torchscript: .*shape '\[7, -1\]' is invalid"
    ):
        run(script(tmp_path, Failing), val_shard)
    with pytest.raises(MachineError, match="'tensorrt' is not available"):
        helper.run_file(script(tmp_path, Means), "torchscript-tensorrt", val_shard, 4)
    assert helper._HELPER.process.pid == pid


def test_the_time_of_one_image_is_told_and_limited(tmp_path, val_shard, monkeypatch):
    assert 0 < helper.time_file(script(tmp_path, Means), "torchscript", val_shard) < 60
    monkeypatch.setattr(helper, "_MAX_SECONDS_TIMED", 1)
    with pytest.raises(ModelError, match=r"gave no answer within 1 seconds in torchscript\. Try"):
        helper.time_file(script(tmp_path, Hanging), "torchscript", val_shard)


def test_a_file_that_crashes_is_refused_by_the_signal_and_the_next_file_runs(tmp_path, val_shard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = script(tmp_path, Crashing)
    with pytest.raises(ModelError, match=r"TorchScript file crashed with SIGSEGV in torchscript\. Try .*float_layers"):
        run(path, val_shard)
    assert list(tmp_path.iterdir()) == [path]
    assert len(run(script(tmp_path, Means), val_shard)) == 4


def test_a_file_that_hangs_is_stopped_and_refused(tmp_path, val_shard, monkeypatch):
    run(script(tmp_path, Means), val_shard)
    process = helper._HELPER.process
    monkeypatch.setattr(helper, "_MAX_SECONDS", 1)
    with pytest.raises(ModelError, match=r"TorchScript file gave no answer within 1 seconds in torchscript\. Try"):
        run(script(tmp_path, Hanging), val_shard)
    assert process.returncode == -signal.SIGALRM


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_helper_that_was_ended_from_outside_is_no_refusal_of_the_file(tmp_path, val_shard, monkeypatch, sent):
    run(script(tmp_path, Means), val_shard)
    process = helper._HELPER.process
    read = process.stdout.readline
    monkeypatch.setattr(process.stdout, "readline", lambda: process.send_signal(sent) or read())
    with pytest.raises(MachineError, match=rf"ended with signal {sent:d} \(\w+\) in torchscript\. If memory ran out"):
        run(script(tmp_path, Hanging), val_shard)


def test_one_that_died_between_two_files_is_replaced(tmp_path, val_shard):
    means = script(tmp_path, Means)
    run(means, val_shard)
    helper._HELPER.process.kill()
    helper._HELPER.process.wait()
    assert len(run(means, val_shard)) == 4


def test_an_interrupted_request_does_not_answer_the_next(tmp_path, val_shard, monkeypatch):
    run(script(tmp_path, Means), val_shard)
    process = helper._HELPER.process

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(process.stdout, "readline", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(script(tmp_path, Hanging), val_shard)
    assert process.returncode == -signal.SIGKILL
    assert len(run(script(tmp_path, Means), val_shard)) == 4


@pytest.mark.usefixtures("ctrl_c_works")
def test_ctrl_c_in_the_terminal_does_not_reach_it(tmp_path):
    command = (
        "import time; from quantlib import helper; helper.start(); print(helper._HELPER.process.pid, flush=True)\n"
    )
    command += "try: time.sleep(60)\nexcept KeyboardInterrupt: time.sleep(1); print(helper._HELPER.process.poll())"
    parent = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    started = int(parent.stdout.readline())
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate()[0] == "None\n"
    until(lambda: not is_alive(started), 30, lambda: "still alive")


def test_it_inherits_no_lock_and_no_socket(tmp_path, val_shard):
    helper._HELPER.stop()
    with socket.create_server(("127.0.0.1", 0)) as server, (tmp_path / "lock").open("w") as lock:
        for each in (server, lock):
            os.set_inheritable(each.fileno(), True)
        run(script(tmp_path, Means), val_shard)
        folder = Path(f"/proc/{helper._HELPER.process.pid}/fd")
        opened = [str(each.readlink()) for each in folder.iterdir()]
    assert [name for name in opened if name.startswith("socket:") or name == str(tmp_path / "lock")] == []
    assert [name for name in opened if name.startswith("pipe:")] != []


def test_a_users_module_in_the_working_folder_is_not_imported(tmp_path, val_shard, monkeypatch):
    helper._HELPER.stop()
    (tmp_path / "json.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    assert len(run(script(tmp_path, Means), val_shard)) == 4


_PARENT = """
import sys
from pathlib import Path
from quantlib import helper
paths = [Path(each) for each in sys.argv[1:]]
helper.run_file(paths[0], "torchscript", paths[-1], 4)
print(helper._HELPER.process.pid, flush=True)
if len(paths) == 2:
    sys.stdin.read()
helper.run_file(paths[1], "torchscript", paths[-1], 4)
"""


@pytest.mark.parametrize("kinds", [[Means], [Means, Hanging]], ids=["idle", "hanging"])
def test_it_ends_with_its_parent_and_leaves_nothing(tmp_path, val_shard, kinds):
    (tmp_path / "tmp").mkdir()
    files = [script(tmp_path, kind) for kind in kinds]
    command = [sys.executable, "-c", _PARENT, *map(str, files), str(val_shard)]
    own = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        assert is_alive(pid)
        parent.kill()
    until(lambda: not is_alive(pid), 10, lambda: "the helper is still there")
    # torch keeps a folder there for the next process.
    assert [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")] == []
