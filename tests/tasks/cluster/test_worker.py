"""The worker's side without a cluster: what a child answers, when it is killed, and whose turn it is."""

import errno
import os
import signal
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from quantlib.errors import MachineError, ModelError
from quantlib.measure import predictions
from quantlib.measure.predictions import Predictions
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.cluster import child, worker
from tasks.cluster.codec import encode
from tasks.quantize import choose_epoch


@pytest.fixture
def request_stage(tmp_path):
    """What a driver sends for a stage that chooses among two epochs."""
    store = Store(tmp_path / "store")
    answers = [
        store.put("predictions", predictions.save(Predictions(np.zeros(9, int), top, np.zeros(9, "f4"))))
        for top in (np.ones((9, 1), int), np.zeros((9, 1), int))
    ]
    refs = tuple(store.put("model", bytes([n])) for n in range(2))
    arguments = choose_epoch.bind(refs, refs, tuple((each,) for each in answers), branch="x")
    return {
        "stage": "tasks.quantize:choose_epoch",
        "arguments": {name: encode(value) for name, value in arguments.items()},
        "ingredients": choose_epoch.ingredients(arguments),
        "run": "r",
        "home": str(tmp_path),
        "alone": False,
    }


def answer(request):
    return child.answer(request, lambda _: None)


def test_a_child_computes_what_this_process_would(request_stage, tmp_path):
    found = answer(request_stage)
    second = Store(tmp_path / "store").put("model", b"\1")
    assert [Ref(**fields) for fields in found["outputs"]][:2] == [second] * 2


def test_a_stage_whose_key_is_another_here_is_refused_with_what_differs(request_stage):
    request_stage["ingredients"] |= {"library.torch": "1.0", "code.quantlib.measure.predictions": "0" * 64}
    found = answer(request_stage)
    assert found["error"] == child.OTHER_CODE == worker.OTHER_CODE
    assert "the code of quantlib.measure.predictions changed; torch 2." in found["message"]


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (ModelError("It is broken."), "ModelError", "It is broken."),
        (OSError(errno.ENOSPC, "No space left on device"), "MachineError", "The disk is full"),
        (ZeroDivisionError("by zero"), "", "ZeroDivisionError: by zero"),
    ],
)
def test_an_error_comes_back_with_its_kind_and_its_message(request_stage, monkeypatch, raised, error, message):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(choose_epoch, "work", fail)
    monkeypatch.setattr(choose_epoch, "ingredients", lambda _: request_stage["ingredients"])
    found = answer(request_stage)
    assert found["error"] == error
    assert found["message"].startswith(message)
    assert ("traceback" in found) == (error == "")


class Call:
    """A call that Dask has not cancelled, unless told so."""

    def __init__(self):
        self.cancelled = False
        self.events = []

    def tell(self, event):
        self.events.append(event)

    def is_cancelled(self):
        return self.cancelled


@pytest.fixture
def process():
    """A child process."""
    found = worker._Child("")
    yield found
    found.end()


def test_a_child_process_answers_one_request_after_another(process, request_stage):
    found = [process.ask(request_stage, Call()) for _ in range(2)]
    assert found[0]["outputs"] == found[1]["outputs"]


def test_a_child_is_killed_once_nobody_waits_for_it(process, request_stage):
    process.process.send_signal(signal.SIGSTOP)
    call = Call()
    threading.Timer(0.3, lambda: setattr(call, "cancelled", True)).start()
    assert process.ask(request_stage, call) == {"died": -signal.SIGKILL}


def test_a_child_that_dies_is_noticed(process, request_stage):
    process.process.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, process.process.kill).start()
    assert process.ask(request_stage, Call()) == {"died": -signal.SIGKILL}


def test_what_a_child_prints_comes_back(process, request_stage):
    process.lines.put(("log", "a warning"))
    call = Call()
    assert "outputs" in process.ask(request_stage, call)
    assert call.events == [{"log": "a warning"}, {"began": True}]


def test_a_child_that_has_loaded_other_code_is_replaced(monkeypatch):
    made = []

    def make(sources):
        made.append(sources)
        return SimpleNamespace(
            sources=sources,
            process=SimpleNamespace(poll=lambda: None),
            ask=lambda *_: {"outputs": []},
            end=lambda: made.append("ended"),
        )

    state = ["old"]
    monkeypatch.setattr(worker, "_Child", make)
    monkeypatch.setattr(worker, "_IDLE", [])
    monkeypatch.setattr(worker, "_sources", lambda: state[0])
    for _ in range(2):
        worker._ask({}, Call())
    assert made == ["old"]
    state[0] = "new"
    worker._ask({}, Call())
    assert made == ["old", "ended", "new"]


def test_a_touched_module_changes_the_state_of_the_code(monkeypatch, tmp_path):
    (tmp_path / "module.py").write_text("A = 1\n")
    monkeypatch.setattr(worker, "quantlib", SimpleNamespace(__path__=[str(tmp_path)]))
    before = worker._sources()
    assert worker._sources() == before
    os.utime(tmp_path / "module.py", ns=(1, 1))
    assert worker._sources() != before


def test_a_stage_that_needs_the_machine_alone_waits_for_the_others_and_keeps_new_ones_out(monkeypatch, tmp_path):
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    inside, order, release = threading.Event(), [], threading.Event()

    def enter(name, *, alone):
        with worker._room(Call(), alone=alone):
            order.append(name)
            inside.set()
            if name == "first":
                release.wait(10)

    threads = [threading.Thread(target=enter, args=("first",), kwargs={"alone": False})]
    threads[0].start()
    assert inside.wait(10)
    for name, alone in (("alone", True), ("later", False)):
        threads.append(threading.Thread(target=enter, args=(name,), kwargs={"alone": alone}))
        threads[-1].start()
        time.sleep(0.2)
    assert order == ["first"]
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "alone", "later"]


def test_a_worker_says_what_it_is_and_which_paths_it_has(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTFLOW_HOME", str(tmp_path))
    ref = Store(tmp_path / "store").put("probe", b"1")
    found = worker.json.loads(worker.describe(worker.json.dumps(asdict(ref))))
    assert found["holds"]
    assert found["machine"]["torch"].startswith("2.")
    assert not worker.json.loads(worker.describe(worker.json.dumps(asdict(ref) | {"sha256": "0" * 64})))["holds"]
    paths = [str(tmp_path), str(tmp_path / "x")]
    assert list(worker.json.loads(worker.find_paths(worker.json.dumps(paths))).values()) == [True, False]


def test_a_stage_that_needs_what_this_machine_lacks_is_refused(request_stage, monkeypatch):
    monkeypatch.setattr(child, "find_needs", lambda _: SimpleNamespace(lacking=lambda _: "onnxruntime 0.1"))
    assert answer(request_stage) == {
        "error": MachineError.__name__,
        "message": "The stage needs onnxruntime 0.1.",
    }
