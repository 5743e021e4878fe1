"""Runs on several machines, which are processes here: the same results as on one, whatever dies."""

import json
import os
import random
import shutil
import signal
import time

import harness
import pytest
from dashboard_driver import PROJECT, find_processes, until
from machines import Cluster

from flows.hosting.processes import is_alive
from tasks.cluster import worker

distributed = pytest.importorskip("distributed", reason="several machines need quantflow[dask]")


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A scheduler and the workers a and b."""
    found = Cluster(tmp_path_factory.mktemp("machines"))
    try:
        found.start_scheduler()
        for name in "ab":
            found.start_worker(name)
        found.wait("a", "b")
        yield found
    finally:
        found.stop()


@pytest.fixture
def cluster(machines):
    """The cluster with an empty home, and with the workers a and b."""
    shutil.rmtree(machines.home, ignore_errors=True)
    yield machines
    for name in set(machines.workers) - {"a", "b"}:
        machines.kill(name)
    if machines.scheduler.poll() is not None:
        machines.start_scheduler()
    for name in {"a", "b"} - set(machines.workers):
        machines.start_worker(name)
    machines.wait("a", "b")


def start(cluster, **options):
    return harness.start_run(cluster.home, engine=cluster.engine, **options)


def num_done(cluster):
    return len(harness.keys_done(cluster.home)) if (cluster.home / "runs").exists() else 0


def computed(home):
    return sorted(line["key"] for line in harness.stage_lines(home) if line.get("cached") is False)


def assert_same(cluster, outcome, undisturbed):
    """The run ended as the one on this machine did, with the same artifacts."""
    untouched, expected = undisturbed
    assert outcome.error == "", outcome.said
    assert outcome.variants == expected.variants
    assert list(outcome.stages) == list(expected.stages)
    assert harness.outputs_of(cluster.home) == harness.outputs_of(untouched)


def test_a_run_on_two_machines_is_the_same_as_on_one_and_computes_each_stage_once(cluster, undisturbed):
    outcome = harness.finish(start(cluster))
    assert_same(cluster, outcome, undisturbed)
    # A machine's log comes back, too.
    assert [said for said in outcome.said if not said.startswith(("a: ", "b: "))] == []
    assert computed(cluster.home) == computed(undisturbed[0])
    assert len(cluster.children()) == 2, "one of the workers computed nothing"


@pytest.mark.slow
def test_the_stages_of_a_machine_that_dies_are_computed_by_the_other(cluster, undisturbed):
    run = start(cluster)
    until(lambda: num_done(cluster) >= 5, 200, cluster.logs)
    children = cluster.children()
    cluster.kill("a")
    outcome = harness.finish(run)
    assert_same(cluster, outcome, undisturbed)
    until(lambda: sum(map(is_alive, children)) <= 1, 30, lambda: "a child outlived its worker")


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_stage_that_nobody_waits_for_any_more_is_ended(how, cluster):
    def request(identity):
        stage = {"stage": "tasks.quantize:choose_epoch", "arguments": {}, "ingredients": {}, "run": "", "alone": False}
        return json.dumps(stage | {"id": identity})

    with distributed.Client(cluster.engine.replace("dask", "tcp"), set_as_default=False) as client:
        # It does not get as far as computing, but there is a process now.
        client.submit(worker.compute, request("first"), pure=False, workers=["a"]).result(timeout=120)
        (child,) = find_processes(cluster.workers["a"].pid, "tasks.cluster.child")
        os.kill(child, signal.SIGSTOP)
        waiting = client.submit(worker.compute, request("second"), pure=False, workers=["a"])
        time.sleep(1)
        assert is_alive(child)
        waiting.cancel() if how == "cancel" else client.close()
        until(lambda: not is_alive(child), 60, cluster.logs)


@pytest.mark.slow
def test_a_machine_that_hangs_is_done_without_and_comes_back(cluster, undisturbed):
    run = start(cluster, constants={"tasks.cluster.executor._SILENT_SECONDS": 5.0})
    until(lambda: num_done(cluster) >= 5, 200, cluster.logs)
    hung = find_processes(cluster.workers["a"].pid)
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    outcome = harness.finish(run)
    for pid in hung:
        os.kill(pid, signal.SIGCONT)
    assert_same(cluster, outcome, undisturbed)
    assert any("a is gone" in said for said in outcome.said), "it was given no stage while it hung"
    cluster.kill("b")
    cluster.wait("a")
    again = harness.finish(start(cluster, recipe=harness.RECIPE | {"name": "again", "seed": 5}))
    assert again.error == "", again.said


@pytest.mark.slow
def test_a_driver_that_dies_takes_its_stages_along_and_the_run_is_resumed(cluster, undisturbed):
    _, expected = undisturbed
    point = next(n for n, label in enumerate(expected.points) if label == "after qat_epoch-qat-0")
    killed = harness.finish(start(cluster, kill_at=point))
    assert killed.exitcode == -9
    done = harness.keys_done(cluster.home)
    outcome = harness.finish(start(cluster, run_id=harness.run_id_of(cluster.home)))
    assert_same(cluster, outcome, undisturbed)
    assert {label for label in done if not outcome.stages[label]} == set()


@pytest.mark.slow
def test_a_scheduler_that_dies_ends_the_run_with_a_message_and_it_is_resumed(cluster, undisturbed):
    run = start(cluster)
    until(lambda: num_done(cluster) >= 5, 200, cluster.logs)
    cluster.kill_scheduler()
    outcome = harness.finish(run)
    assert f"The Dask scheduler at tcp://127.0.0.1:{cluster.port} is gone" in outcome.error
    done = harness.keys_done(cluster.home)
    cluster.start_scheduler()
    cluster.wait("a", "b")
    outcome = harness.finish(start(cluster, run_id=harness.run_id_of(cluster.home)))
    assert_same(cluster, outcome, undisturbed)
    assert {label for label in done if not outcome.stages[label]} == set()


@pytest.mark.slow
def test_a_machine_with_other_code_is_named_and_computes_nothing(cluster, undisturbed, tmp_path):
    for package in ("flows", "tasks", "quantlib", "recipes"):
        shutil.copytree(PROJECT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "quantlib" / "data" / "loading.py").open("a") as file:
        file.write("\nEDITED = 1\n")
    cluster.start_worker("c", project=tmp_path)
    cluster.wait("a", "b", "c")
    outcome = harness.finish(start(cluster))
    assert_same(cluster, outcome, undisturbed)
    (said,) = [each for each in outcome.said if each.startswith("c ")]
    assert said.startswith("c gets no more stages of this run: its quantflow, or what that uses, differs")
    assert "the code of quantlib.data.loading changed" in said


FULL = """
import errno, os, sys
if "tasks.cluster.child" in sys.orig_argv:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    os.fsync = full
"""


@pytest.mark.slow
def test_a_machine_whose_disk_is_full_is_named_and_the_others_go_on(cluster, undisturbed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FULL)
    cluster.start_worker("c", PYTHONPATH=str(tmp_path))
    cluster.wait("a", "b", "c")
    outcome = harness.finish(start(cluster))
    assert_same(cluster, outcome, undisturbed)
    (said,) = [each for each in outcome.said if each.startswith("c ")]
    assert said.startswith("c gets no more stages of this run: The disk is full: nothing more can be written below")


@pytest.mark.slow
def test_a_run_on_a_machine_that_is_the_only_one_and_full_fails_with_its_name_and_is_resumed(
    cluster, undisturbed, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(FULL)
    cluster.start_worker("c", PYTHONPATH=str(tmp_path))
    for name in "ab":
        cluster.kill(name)
    cluster.wait("c")
    outcome = harness.finish(start(cluster))
    assert "MachineError: No worker can compute " in outcome.error
    assert "c: The disk is full" in outcome.error
    for name in "ab":
        cluster.start_worker(name)
    cluster.kill("c")
    cluster.wait("a", "b")
    assert_same(cluster, harness.finish(start(cluster, run_id=harness.run_id_of(cluster.home))), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_killed_at_random_the_results_are_the_same(seed, cluster, undisturbed):
    rng = random.Random(seed)
    for _ in range(3):
        victim = rng.choice(["a", "b", "scheduler", "driver"])
        run = start(cluster, run_id=harness.run_id_of(cluster.home) if num_done(cluster) else None)
        time.sleep(rng.uniform(1, 15))
        if victim == "driver":
            run.kill()
        else:
            cluster.replace(victim)
        outcome = harness.finish(run)
        assert outcome.exitcode in {0, -9}
        assert outcome.error == "" or "is gone" in outcome.error
        cluster.wait("a", "b")
    outcome = harness.finish(start(cluster, run_id=harness.run_id_of(cluster.home) if num_done(cluster) else None))
    assert_same(cluster, outcome, undisturbed)
