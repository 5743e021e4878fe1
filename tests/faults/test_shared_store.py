"""Machines that share a store; processes with homes of their own stand for machines."""

import os
import random
import signal
import subprocess
import time
from collections import Counter

import harness
import object_server
import pytest
from harness import computed

from quantlib.store.opening import open_store
from quantlib.store.retention import find_damage

LEASE_S = 2.0
QUICK = {
    "quantlib.store.leases.TIME_TO_LIVE_S": LEASE_S,
    "quantlib.store.bucket._PATIENCE_S": 20.0,
    "quantlib.store.bucket._FIRST_PATIENCE_S": 20.0,
}
# Shares all of its stages but those of one branch with the harness's recipe.
MORE = {**harness.RECIPE, "name": "more", "ptq": [*harness.RECIPE["ptq"], {"name": "minmax", "qconfig": "default"}]}
PAUSED = "inside qat_epoch-qat-0"


@pytest.fixture
def folder_store(tmp_path):
    (tmp_path / "shared").mkdir()
    return {"QUANTFLOW_STORE": str(tmp_path / "shared")}


@pytest.fixture(params=["folder", "troubled bucket"])
def shared(request):
    """The environment of machines that share a store."""
    if request.param == "folder":
        return request.getfixturevalue("folder_store")
    proxy = request.getfixturevalue("proxy")
    proxy.decide = troubles(0)
    return object_server.environment(proxy, os.urandom(8).hex())


def troubles(seed):
    """A tenth of all requests fail, in every way that a server or a network knows."""
    rng = random.Random(seed)
    kinds = ["lose", "drop", 409, 503]
    return lambda method, path, number: rng.choice(kinds) if method == "PUT" and rng.random() < 0.1 else None


@pytest.fixture
def own_server():
    """An object store that the test may kill."""
    pytest.importorskip("moto", reason="needs moto[server]")
    server = object_server.ObjectServer()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """The records in a shared store, as a machine with an empty home reads them."""

    def read(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = open_store(tmp_path / "a reader")
        assert find_damage(store)[1] == []
        return {record.key: record.outputs for record in store.records() if record.stage != "benchmark"}

    return read


def start(home, shared, **options):
    return harness.start_run(home, environment=shared, constants=QUICK, **options)


def run(home, shared, **options):
    return harness.finish(start(home, shared, **options))


def check(outcome, undisturbed):
    assert outcome.error == ""
    assert outcome.variants == undisturbed[1].variants


def test_each_stage_is_computed_once_by_all_machines_and_all_agree(shared, undisturbed, tmp_path, stored):
    untouched, _ = undisturbed
    homes = [tmp_path / "first", tmp_path / "second"]
    outcomes = [harness.finish(each) for each in [start(homes[0], shared), start(homes[1], shared, recipe=MORE)]]
    check(outcomes[0], undisturbed)
    assert outcomes[1].error == ""
    files = [{row["variant"]: row["artifact_sha256"] for row in outcome.variants} for outcome in outcomes]
    assert files[0].items() < files[1].items()
    by_key = computed(homes[0]) + computed(homes[1])
    assert set(by_key.values()) == {1}
    assert computed(untouched).keys() < by_key.keys()
    made, alone = stored(shared), harness.outputs_of(untouched)
    assert {key: made[key] for key in alone} == alone

    third = run(tmp_path / "third", shared)
    check(third, undisturbed)
    assert computed(tmp_path / "third") == Counter()


def kill_and_check(point, shared, undisturbed, tmp_path, stored):
    """Kill a machine at a point of its work; another one continues, and then the first one resumes."""
    untouched, expected = undisturbed
    first, second = tmp_path / "first", tmp_path / "second"
    killed = run(first, shared, kill_at=point)
    assert killed.exitcode == -signal.SIGKILL, killed.error
    done = computed(first)
    check(run(second, shared), undisturbed)
    # What the dead machine had finished was not computed again, and what it had begun was.
    assert set((done + computed(second)).values()) == {1}, expected.points[point]
    resumed = run(first, shared, run_id=harness.run_id_of(first) if (first / "runs").exists() else None)
    check(resumed, undisturbed)
    assert computed(first) == done
    assert stored(shared) == harness.outputs_of(untouched), expected.points[point]


def test_another_machine_continues_where_one_died(folder_store, undisturbed, tmp_path, stored):
    point = undisturbed[1].points.index(PAUSED)
    kill_and_check(point, folder_store, undisturbed, tmp_path, stored)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_machines_that_die_anywhere_change_no_artifact(shared, undisturbed, tmp_path, stored):
    rng = random.Random(1)
    for number in range(12):
        place = tmp_path / f"{number}"
        place.mkdir()
        environment = {**shared, "QUANTFLOW_STORE": f"{shared['QUANTFLOW_STORE']}/{number}"}
        if "AWS_REGION" not in shared:
            (tmp_path / "shared" / f"{number}").mkdir()
        kill_and_check(rng.randrange(len(undisturbed[1].points)), environment, undisturbed, place, stored)


def test_a_machine_that_was_paused_loses_its_lease_and_adopts_what_the_other_made(
    folder_store, undisturbed, tmp_path, stored
):
    untouched, _ = undisturbed
    first, second = tmp_path / "first", tmp_path / "second"
    paused = start(first, folder_store, hold_at=PAUSED)
    harness.wait_until(paused.held.exists)
    os.kill(paused.pid, signal.SIGSTOP)
    check(run(second, folder_store), undisturbed)
    paused.held.unlink()
    os.kill(paused.pid, signal.SIGCONT)
    check(harness.finish(paused), undisturbed)
    twice = {key for key, times in (computed(first) + computed(second)).items() if times > 1}
    assert twice == keys_of(untouched, "qat_epoch-qat-0")
    assert stored(folder_store) == harness.outputs_of(untouched)


def keys_of(home, label):
    return {key for found, key in harness.keys_done(home).items() if found == label}


def test_a_machine_that_is_cut_off_names_the_server_and_its_run_can_be_resumed(
    s3, proxy, undisturbed, tmp_path, stored
):
    prefix = os.urandom(8).hex()
    theirs, others = (object_server.environment(server, prefix) for server in (proxy, s3))
    first, second = tmp_path / "first", tmp_path / "second"
    cut_off = harness.start_run(
        first, environment=theirs, constants=QUICK | {"quantlib.store.bucket._PATIENCE_S": 3.0}, hold_at=PAUSED
    )
    harness.wait_until(cut_off.held.exists)
    proxy.decide = lambda method, path, number: "drop"
    check(run(second, others), undisturbed)
    cut_off.held.unlink()
    failed = harness.finish(cut_off)
    assert f"MachineError: The shared store {theirs['QUANTFLOW_STORE']} at {proxy.url} has not answered" in failed.error
    proxy.decide = lambda method, path, number: None
    resumed = run(first, theirs, run_id=harness.run_id_of(first))
    check(resumed, undisturbed)
    assert stored(others) == harness.outputs_of(undisturbed[0])


def test_a_server_that_dies_with_all_it_held_costs_work_and_changes_nothing(own_server, undisturbed, tmp_path, stored):
    shared = object_server.environment(own_server, "p")
    homes = [tmp_path / "first", tmp_path / "second"]
    first = start(homes[0], shared, hold_at=PAUSED)
    harness.wait_until(first.held.exists)
    own_server.kill()
    first.held.unlink()
    own_server.start()
    check(harness.finish(first), undisturbed)
    check(run(homes[1], shared), undisturbed)
    assert stored(shared) == harness.outputs_of(undisturbed[0])


def test_a_server_that_stays_dead_is_named_and_the_run_can_be_resumed(own_server, undisturbed, tmp_path):
    shared, home = object_server.environment(own_server, "p"), tmp_path / "home"
    process = harness.start_run(
        home, environment=shared, constants=QUICK | {"quantlib.store.bucket._PATIENCE_S": 2.0}, hold_at=PAUSED
    )
    harness.wait_until(process.held.exists)
    own_server.kill()
    process.held.unlink()
    failed = harness.finish(process)
    assert f"at {own_server.url} has not answered" in failed.error
    assert "`quantflow resume`" in failed.error
    own_server.start()
    check(run(home, shared, run_id=harness.run_id_of(home)), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_server_that_dies_again_and_again_changes_nothing(own_server, undisturbed, tmp_path, stored):
    rng = random.Random(2)
    shared = object_server.environment(own_server, "p")
    for number in range(5):
        homes = [tmp_path / f"first {number}", tmp_path / f"second {number}"]
        processes = [start(home, shared) for home in homes]
        for _ in range(3):
            time.sleep(rng.uniform(1, 6))
            own_server.kill()
            time.sleep(rng.uniform(0, 2))
            own_server.start()
        for home, process in zip(homes, processes, strict=True):
            outcome = harness.finish(process)
            if outcome.error:
                assert own_server.url in outcome.error
                outcome = run(home, shared, run_id=harness.run_id_of(home))
            check(outcome, undisturbed)
        check(run(tmp_path / f"third {number}", shared), undisturbed)
        assert stored(shared) == harness.outputs_of(undisturbed[0])
        own_server.kill()
        own_server.start()


def test_a_full_shared_folder_is_named_and_the_run_resumes_when_there_is_room(
    small_disk, undisturbed, tmp_path, stored
):
    (small_disk / "shared").mkdir()
    shared, home = {"QUANTFLOW_STORE": str(small_disk / "shared")}, tmp_path / "home"
    full = run(home, shared)
    assert f"MachineError: The shared store {small_disk / 'shared'} is full: free some space there" in full.error
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    check(run(home, shared, run_id=harness.run_id_of(home)), undisturbed)
    assert stored(shared) == harness.outputs_of(undisturbed[0])
