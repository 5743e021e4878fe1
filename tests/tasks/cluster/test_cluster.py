"""What passes between a flow and its workers, and which worker gets a stage; without a cluster."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from schemes import scheme

from quantlib import identity
from quantlib.data.split import SplitInput, Subset
from quantlib.data.transforms import EvalTransform, TrainTransform
from quantlib.errors import MachineError
from quantlib.models.source import ModelInput
from quantlib.recipe.interface import Interface
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.sections import TrainingRecipe
from quantlib.runtimes import available
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks import data, export, measure, model, quantize
from tasks.cluster import child
from tasks.cluster.codec import decode, encode
from tasks.cluster.machines import Machines, Worker
from tasks.cluster.needs import find_needs
from tasks.model import Training
from tasks.refs import BenchmarkTarget
from tasks.stage import Stage

SPLIT = SplitInput("imagefolder", "train", "/data/flowers", "f" * 64, 9, ("a", "b"))
IMAGES = Subset(SPLIT, 1, 0, 6)
TRANSFORM = TrainTransform(crop=(8, 8), scale=(0.1, 1.0), flip=0.5)
RUNTIME = Runtime("openvino", "2026.1", "avx2")
REF = Ref("model", "0" * 64, 3)
VALUES = [
    None,
    (1, 2.5, "x", True, (None,)),
    REF,
    IMAGES,
    EvalTransform(resize=(9, 8), crop=(8, 8)),
    scheme("accurate"),
    Schedule(None, 2, None, 0.1, "constant", 0, 0, seed=0),
    Training(IMAGES, TRANSFORM, TrainingRecipe(epochs=2)),
    ModelInput("mobilenet_v2", "{}", "weights.pth", "1" * 64, ""),
    (BenchmarkTarget(REF, RUNTIME),),
    Interface(softmax=True),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_an_argument_arrives_as_it_was_sent(value):
    sent = json.dumps(encode(value))
    assert decode(json.loads(sent)) == value


@pytest.mark.parametrize("name", ["pathlib:Path", "quantlib.files:read_file", "os:system"])
def test_nothing_but_our_own_plain_classes_is_made_from_what_arrives(name):
    with pytest.raises(ValueError, match="is no class of quantflow's that stages take"):
        decode({"type": name, "fields": {}})


def test_an_argument_that_cannot_travel_is_refused_by_the_sender():
    with pytest.raises(TypeError, match="a PosixPath, which cannot be sent"):
        encode(Path("x"))


def test_every_stage_is_found_by_its_name_and_nothing_else_is():
    stages = [value for each in (data, export, measure, model, quantize) for value in vars(each).values()]
    for stage in (value for value in stages if isinstance(value, Stage)):
        assert child._find_stage(f"{stage.work.__module__}:{stage.name}") is stage
    for name in ("tasks.report:write_report", "os:system", "tasks.model:nothing"):
        with pytest.raises(ValueError, match="is no stage"):
            child._find_stage(name)


# What a stage needs


def test_a_stage_needs_the_files_that_it_reads_and_the_runtimes_that_it_uses():
    source = ModelInput("file:", "{}", "weights.pth", "1", "2", file="/models/net.pt2")
    needs = find_needs({"images": IMAGES, "model": source, "targets": (BenchmarkTarget(REF, RUNTIME),), "cpu": "X"})
    assert needs.paths == ("/data/flowers", "/models/net.pt2", "weights.pth")
    assert needs.runtimes == (RUNTIME,)
    assert needs.cpu == "X"
    named = find_needs({"model": replace(source, weights="torchvision:X", file="")})
    assert named.paths == ()


def test_a_machine_with_another_runtime_exporter_or_cpu_lacks_it():
    here = replace(available.this_machine(), runtimes=(RUNTIME,), exporter="onnx 1", cpu_model="X")
    arguments = {"runtime": RUNTIME, "exporter": "onnx 1", "cpu": "X"}
    assert find_needs(arguments).lacking(here) == ""
    assert find_needs(arguments).lacking(replace(here, runtimes=())) == "openvino 2026.1 on a CPU with avx2"
    assert find_needs(arguments).lacking(replace(here, exporter="onnx 2")) == "onnx 1"
    assert find_needs(arguments).lacking(replace(here, cpu_model="Y")) == "the CPU X"


# Which worker gets a stage


@pytest.fixture
def join():
    """Adds workers to a cluster that waits for nothing."""
    machines = Machines(patience=0.0)

    def add(name, num_slots=1, **facts):
        worker = Worker(f"tcp://{name}", name, num_slots, replace(available.this_machine(), name=name, **facts))
        machines.join(worker)
        return worker

    add.machines = machines
    return add


NOTHING = find_needs({})


def take(machines, held, needs=NOTHING, *, alone=False):
    """Take a slot in a thread of its own, and hold it until `held` is set; return what is taken, and the thread."""
    taken = []

    def run():
        with machines.slot("it", needs, alone=alone) as worker:
            taken.append(worker.name)
            held.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    return taken, thread


def until(condition):
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_stages_spread_over_the_workers_and_wait_for_a_free_slot(join):
    join("a", 2), join("b")
    with (
        join.machines.slot("1", NOTHING, alone=False) as first,
        join.machines.slot("2", NOTHING, alone=False) as second,
    ):
        assert {first.name, second.name} == {"a", "b"}
        with join.machines.slot("3", NOTHING, alone=False) as third:
            assert third.name == "a"
            done = threading.Event()
            taken, thread = take(join.machines, done)
            assert taken == []
        until(lambda: taken == ["a"])
    done.set()
    thread.join()


def test_a_worker_that_joins_late_gets_the_stage_that_waits(join):
    join("a")
    done = threading.Event()
    with join.machines.slot("long", NOTHING, alone=False):
        taken, thread = take(join.machines, done)
        join("b")
        until(lambda: taken == ["b"])
        done.set()
        thread.join()


def test_files_are_timed_on_one_machine_while_nothing_else_runs_there(join):
    join("a", 2), join("b")
    free, timed = threading.Event(), threading.Event()
    first, second = (take(join.machines, free) for _ in range(2))
    until(lambda: len(first[0] + second[0]) == 2)
    alone, alone_thread = take(join.machines, timed, alone=True)
    # It waits longer than this one, which must not keep the machine busy.
    later, later_thread = take(join.machines, free)
    assert (alone, later) == ([], [])
    free.set()
    until(lambda: alone == ["a"])
    until(lambda: later == ["b"])
    blocked, blocked_thread = take(join.machines, free)
    until(lambda: blocked == ["b"])
    timed.set()
    for thread in (first[1], second[1], alone_thread, later_thread, blocked_thread):
        thread.join()


def test_two_workers_on_one_machine_are_not_idle_unless_both_are(join):
    machines = join.machines
    for name in ("a", "b"):
        machines.join(Worker(f"tcp://{name}", name, 1, replace(available.this_machine(), name="same")))
    free, timed = threading.Event(), threading.Event()
    timed.set()
    with machines.slot("1", NOTHING, alone=False) as worker:
        assert worker.name == "a"
        with machines.slot("2", NOTHING, alone=False):
            pass
        alone, thread = take(machines, timed, alone=True)
        assert alone == []
    until(lambda: alone == ["a"])
    thread.join()
    free.set()


def test_a_stage_goes_where_its_dataset_is(join):
    a, b = join("a"), join("b")
    needs = find_needs({"images": IMAGES})
    done = threading.Event()
    taken, thread = take(join.machines, done, needs)
    until(lambda: len(join.machines.unknown()) == 2)
    assert taken == []
    join.machines.learn(a, {"/data/flowers": False})
    join.machines.learn(b, {"/data/flowers": True})
    until(lambda: taken == ["b"])
    done.set()
    thread.join()
    join.machines.learn(b, {"/data/flowers": False})
    with (
        pytest.raises(
            MachineError, match=r"No worker can compute decode. a: it lacks /data/flowers; b: it lacks /data"
        ),
        join.machines.slot("decode", needs, alone=False),
    ):
        pass


def test_a_worker_that_was_set_aside_gets_nothing_and_is_named_with_the_reason(join):
    a, _ = join("a"), join("b")
    join.machines.set_aside(a, "The disk is full")
    with join.machines.slot("x", NOTHING, alone=False) as worker:
        assert worker.name == "b"
    join.machines.set_aside(worker, "it has other code")
    with (
        pytest.raises(MachineError, match=r"No worker can compute x. a: The disk is full; b: it has other code"),
        join.machines.slot("x", NOTHING, alone=False),
    ):
        pass


def test_the_worker_that_times_files_is_the_named_one(join):
    machines = Machines("b", patience=0.0)
    join("a")
    with pytest.raises(MachineError, match="No worker named 'b', which is to time files, is connected"):
        machines.timing_worker()
    for name in ("a", "b"):
        machines.join(Worker(f"tcp://{name}", name, 1, available.this_machine()))
    assert machines.timing_worker().name == "b"
    with machines.slot("benchmark", NOTHING, alone=True) as worker:
        assert worker.name == "b"


def test_workers_that_are_gone_are_told_to_those_who_wait_for_them(join):
    a = join("a")
    join.machines.keep({})
    assert a.is_gone
    with (
        pytest.raises(MachineError, match="No worker is connected"),
        join.machines.slot("x", NOTHING, alone=False),
    ):
        pass


def test_what_waits_for_a_machine_ends_when_the_driver_does(join):
    join.machines.stop(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), join.machines.slot("x", NOTHING, alone=False):
        pass


# The check of what a stage reads outside the store


def test_a_worker_with_other_images_refuses(own_folder, tmp_path):
    split = identity.find_split(identity.DataRecipe(format="imagefolder", root=str(own_folder)), "val", tmp_path)
    identity.check_split(split, tmp_path)
    next((own_folder / "val").rglob("*.png")).unlink()
    with pytest.raises(MachineError, match=r"The val split in .* is not the one that the run began with"):
        identity.check_split(split, tmp_path)


def test_a_worker_with_other_weights_or_other_code_refuses(tmp_path, monkeypatch):
    weights, module = tmp_path / "weights.pth", tmp_path / "worker_net.py"
    weights.write_bytes(b"1")
    module.write_text("def build(): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code = identity.user_code("worker_net:build", "model.architecture")
    fingerprint = identity.hash_model_file(str(weights), "")
    source = ModelInput("worker_net:build", "{}", str(weights), fingerprint, code)
    identity.check_model(source)
    with pytest.raises(MachineError, match="the code of its architecture differs"):
        identity.check_model(replace(source, code="0" * 64))
    weights.write_bytes(b"2")
    with pytest.raises(MachineError, match="has other weights"):
        identity.check_model(source)
