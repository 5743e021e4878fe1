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
import small_run
from harness import computed

from quantlib.store.journal import read_runs

QUICK = {
    "quantlib.store.leases.TIME_TO_LIVE_S": 2.0,
    "quantlib.store.bucket._PATIENCE_S": 60.0,
    "quantlib.store.bucket._FIRST_PATIENCE_S": 60.0,
}
IMPATIENT = QUICK | {"quantlib.store.bucket._PATIENCE_S": 2.0}
PAUSED = "inside combine-2"


@pytest.fixture
def folder_store(tmp_path):
    (tmp_path / "shared").mkdir()
    return {"QUANTFLOW_STORE": str(tmp_path / "shared")}


@pytest.fixture(params=["folder", pytest.param("troubled bucket", marks=pytest.mark.slow)])
def shared(request):
    """The environment of machines that share a store."""
    if request.param == "folder":
        return request.getfixturevalue("folder_store")
    proxy = request.getfixturevalue("proxy")
    proxy.decide = troubles(0)
    return object_server.environment(proxy, os.urandom(8).hex())


def troubles(seed):
    """A tenth of all writes fail, in every way that a server or a network knows."""
    rng = random.Random(seed)
    kinds = ["lose", "drop", 409, 503]
    return lambda method, path, number: rng.choice(kinds) if method == "PUT" and rng.random() < 0.1 else None


@pytest.fixture
def own_server():
    """An object store that the test may kill."""
    with object_server.serving() as server:
        yield server


def start(home, shared, recipe=small_run.RECIPE, constants=QUICK, **options):
    return harness.start_run(
        home, environment=shared, constants=constants, recipe=recipe, body=small_run.run_stages, **options
    )


def run(home, shared, **options):
    return harness.finish(start(home, shared, **options))


def resume(home, shared, **options):
    # A machine that was killed at its very start has no run yet.
    return run(home, shared, run_id=harness.run_id_of(home) if read_runs(home / "runs") else None, **options)


def outputs_of(outcome):
    """The artifacts that a run continued from, by label."""
    assert outcome.error == ""
    (outputs,) = outcome.variants
    return outputs


def keys_by_label(home, *labels):
    return {key for label, key in harness.keys_done(home).items() if label in labels}


# Whole recipes


@pytest.mark.slow
def test_a_recipe_gives_the_same_on_one_home_and_on_machines_that_share_a_store(shared, undisturbed, tmp_path, stored):
    untouched, expected = undisturbed
    homes = [tmp_path / "first", tmp_path / "second"]
    # Seconds, not milliseconds: on a busy machine, a holder may be slow to renew.
    slower = QUICK | {"quantlib.store.leases.TIME_TO_LIVE_S": 30.0}
    processes = [harness.start_run(home, environment=shared, constants=slower) for home in homes]
    outcomes = [harness.finish(process, timeout=500) for process in processes]
    assert [outcome.error for outcome in outcomes] == [""] * 2
    assert [outcome.variants for outcome in outcomes] == [expected.variants] * 2
    assert computed(homes[0]) + computed(homes[1]) == computed(untouched)
    assert stored(shared) == harness.outputs_of(untouched)
    third = harness.run(tmp_path / "third", environment=shared, constants=slower)
    assert third.error == ""
    assert third.variants == expected.variants
    assert computed(tmp_path / "third") == Counter()


# Small stages


def test_recipes_that_share_stages_compute_each_once_and_a_third_machine_none(shared, tmp_path, stored):
    homes = [tmp_path / "first", tmp_path / "second"]
    processes = [start(homes[0], shared), start(homes[1], shared, recipe=small_run.LONGER)]
    first, second = (outputs_of(harness.finish(process)) for process in processes)
    assert first.items() < second.items()
    assert set((computed(homes[0]) + computed(homes[1])).values()) == {1}
    assert outputs_of(run(tmp_path / "third", shared)) == first
    assert computed(tmp_path / "third") == Counter()
    assert {ref.sha256 for (ref,) in stored(shared).values()} == set(second.values())


def check_continuation(shared, tmp_path, stored):
    """Another machine continues where the first one was killed, and then the first one resumes."""
    first, second = tmp_path / "first", tmp_path / "second"
    done = computed(first)
    outputs = outputs_of(run(second, shared))
    # What the dead machine had finished was not computed again.
    assert set((done + computed(second)).values()) == {1}
    assert outputs_of(resume(first, shared)) == outputs
    assert computed(first) == done
    assert {ref.sha256 for (ref,) in stored(shared).values()} == set(outputs.values())


NUM_KILLS = 30


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n % 6 == 3 else pytest.mark.slow) for n in range(NUM_KILLS)]
)
def test_another_machine_continues_where_one_was_killed(number, folder_store, tmp_path, stored):
    # There are more than a hundred points; how many more depends on how often the machine renews its leases.
    killed = run(tmp_path / "first", folder_store, kill_at=number * 90 // NUM_KILLS)
    assert killed.exitcode == -signal.SIGKILL, killed.error
    check_continuation(folder_store, tmp_path, stored)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(15))
def test_another_machine_continues_whenever_one_is_killed(seed, proxy, tmp_path, stored):
    proxy.decide = troubles(seed)
    shared = object_server.environment(proxy, os.urandom(8).hex())
    doomed = start(tmp_path / "first", shared)
    harness.wait_until(lambda: bool(computed(tmp_path / "first")))
    time.sleep(random.Random(seed).uniform(0, 1))
    doomed.kill()
    doomed.join()
    check_continuation(shared, tmp_path, stored)


def test_a_machine_that_was_paused_loses_its_lease_and_adopts_what_the_other_made(shared, tmp_path, stored):
    first, second = tmp_path / "first", tmp_path / "second"
    paused = start(first, shared, hold_at="inside draw")
    harness.wait_until(paused.held.exists)
    os.kill(paused.pid, signal.SIGSTOP)
    outputs = outputs_of(run(second, shared))
    paused.held.unlink()
    os.kill(paused.pid, signal.SIGCONT)
    # What it drew is another result than the other machine's; it continues from that one.
    assert outputs_of(harness.finish(paused)) == outputs
    twice = {key for key, times in (computed(first) + computed(second)).items() if times > 1}
    assert twice == keys_by_label(first, "draw")
    assert {ref.sha256 for (ref,) in stored(shared).values()} == set(outputs.values())


def test_a_machine_that_is_cut_off_names_the_server_and_its_run_can_be_resumed(s3, proxy, tmp_path, stored):
    prefix = os.urandom(8).hex()
    theirs, others = (object_server.environment(server, prefix) for server in (proxy, s3))
    cut_off = start(tmp_path / "first", theirs, constants=IMPATIENT, hold_at=PAUSED)
    harness.wait_until(cut_off.held.exists)
    proxy.decide = lambda method, path, number: "drop"
    outputs = outputs_of(run(tmp_path / "second", others))
    cut_off.held.unlink()
    failed = harness.finish(cut_off)
    assert f"MachineError: The shared store {theirs['QUANTFLOW_STORE']} at {proxy.url} has not answered" in failed.error
    assert "`quantflow resume`" in failed.error
    proxy.decide = lambda method, path, number: None
    assert outputs_of(resume(tmp_path / "first", theirs)) == outputs
    assert {ref.sha256 for (ref,) in stored(others).values()} == set(outputs.values())


def test_a_server_that_answers_nothing_for_a_while_is_waited_for(own_server, tmp_path):
    shared = object_server.environment(own_server, "p")
    process = start(tmp_path / "first", shared, hold_at=PAUSED)
    harness.wait_until(process.held.exists)
    own_server.pause()
    process.held.unlink()
    time.sleep(1)
    own_server.resume()
    assert outputs_of(harness.finish(process)) == outputs_of(run(tmp_path / "second", shared))


def test_a_server_that_dies_with_all_it_held_costs_work_and_changes_nothing(own_server, tmp_path, stored):
    shared, alone = object_server.environment(own_server, "p"), {"QUANTFLOW_STORE": ""}
    expected = outputs_of(run(tmp_path / "alone", alone, recipe=small_run.CERTAIN))
    first = start(tmp_path / "first", shared, recipe=small_run.CERTAIN, hold_at=PAUSED)
    harness.wait_until(first.held.exists)
    own_server.kill()
    first.held.unlink()
    own_server.start()
    assert outputs_of(harness.finish(first)) == expected
    assert outputs_of(run(tmp_path / "second", shared, recipe=small_run.CERTAIN)) == expected
    assert {ref.sha256 for (ref,) in stored(shared).values()} == set(expected.values())


def test_a_server_that_stays_dead_is_named_and_the_run_can_be_resumed(own_server, tmp_path):
    shared, home = object_server.environment(own_server, "p"), tmp_path / "home"
    process = start(home, shared, constants=IMPATIENT, hold_at=PAUSED)
    harness.wait_until(process.held.exists)
    own_server.kill()
    process.held.unlink()
    failed = harness.finish(process)
    assert f"at {own_server.url} has not answered" in failed.error
    own_server.start()
    assert outputs_of(resume(home, shared)) == outputs_of(run(tmp_path / "second", shared))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_server_that_dies_again_and_again_changes_nothing(own_server, tmp_path, stored):
    rng = random.Random(2)
    shared = object_server.environment(own_server, "p")
    expected = outputs_of(run(tmp_path / "alone", {"QUANTFLOW_STORE": ""}, recipe=small_run.CERTAIN))
    for number in range(10):
        homes = [tmp_path / f"first {number}", tmp_path / f"second {number}"]
        processes = [start(home, shared, recipe=small_run.CERTAIN) for home in homes]
        for _ in range(2):
            time.sleep(rng.uniform(0, 1))
            own_server.kill()
            time.sleep(rng.uniform(0, 1))
            own_server.start()
        for home, process in zip(homes, processes, strict=True):
            outcome = harness.finish(process)
            if outcome.error:
                # A bucket is empty for a moment, or gone.
                assert own_server.url in outcome.error or "missing from the shared store" in outcome.error
                outcome = resume(home, shared, recipe=small_run.CERTAIN)
            assert outputs_of(outcome) == expected
        assert outputs_of(run(tmp_path / f"third {number}", shared, recipe=small_run.CERTAIN)) == expected
        assert {ref.sha256 for (ref,) in stored(shared).values()} == set(expected.values())
        own_server.kill()
        own_server.start()


def test_a_full_shared_folder_is_named_and_the_run_resumes_when_there_is_room(small_disk, tmp_path, stored):
    (small_disk / "shared").mkdir()
    shared, home = {"QUANTFLOW_STORE": str(small_disk / "shared")}, tmp_path / "home"
    subprocess.run(["mount", "-o", "remount,size=300k", small_disk], check=True)
    full = run(home, shared)
    assert f"MachineError: The shared store {small_disk / 'shared'} is full: free some space there" in full.error
    done = computed(home)
    assert done
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    outputs = outputs_of(resume(home, shared))
    assert max(computed(home).values()) == 1
    assert {ref.sha256 for (ref,) in stored(shared).values()} == set(outputs.values())


def test_damage_in_the_shared_store_ends_a_run_with_a_message_and_the_next_one_repairs_it(
    folder_store, tmp_path, stored
):
    outputs = outputs_of(run(tmp_path / "first", folder_store))
    sha256 = outputs["combine-5"]
    blob = tmp_path / "shared" / "blobs" / sha256[:2] / sha256
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    # Two stages of this recipe follow from that artifact.
    damaged = run(tmp_path / "second", folder_store, recipe=small_run.LONGER)
    assert f"Artifact {sha256} was damaged in the shared store" in damaged.error
    assert "Run the recipe again" in damaged.error
    repaired = resume(tmp_path / "second", folder_store, recipe=small_run.LONGER)
    assert outputs.items() < outputs_of(repaired).items()
    assert [label for label, cached in repaired.stages.items() if not cached] == ["combine-5", "combine-6", "combine-7"]
    assert len(stored(folder_store)) == len(repaired.stages)
