"""Runs on several machines, each with a home of its own and the same object store: whatever fails, the same results."""

import os
import random
import shutil
import time
from collections import Counter

import harness
import object_server
import pytest
from dashboard_driver import until
from machines import Cluster
from network import open_network

from quantlib.store.journal import read_runs

pytest.importorskip("distributed", reason="several machines need quantflow[dask]")
pytestmark = pytest.mark.slow

# A store that answers nothing ends a run sooner, and a driver that was killed holds up the next one for less time.
QUICK = {
    "quantlib.store.leases.TIME_TO_LIVE_S": 5.0,
    "quantlib.store.bucket._PATIENCE_S": 60.0,
    "quantlib.store.bucket._FIRST_PATIENCE_S": 60.0,
}


@pytest.fixture
def server():
    """An object store that the test may kill."""
    with object_server.serving() as found:
        yield found


@pytest.fixture
def cluster(server, tmp_path):
    """The workers a and b."""
    found = Cluster(tmp_path, shared=object_server.environment(server, "p"))
    yield from started(found, {"a": (), "b": ()})


def started(cluster, machines):
    """The cluster with workers, each on its machine, until the test is over."""
    try:
        cluster.start_scheduler()
        for name, before in machines.items():
            cluster.start_worker(name, before=before)
        cluster.wait(*machines)
        yield cluster
    finally:
        cluster.stop()


def start(cluster, **options):
    runs = cluster.home / "runs"
    unfinished = runs.exists() and [run for run in read_runs(runs) if run.state in {"crashed", "failed"}]
    run_id = harness.run_id_of(cluster.home) if unfinished else None
    options = {"engine": cluster.engine, "environment": cluster.shared, "constants": QUICK} | options
    return harness.start_run(cluster.home, run_id=run_id, **options)


def num_done(cluster):
    return len(harness.keys_done(cluster.home)) if (cluster.home / "runs").exists() else 0


def test_each_stage_is_computed_once_and_another_machine_with_an_empty_home_computes_none(
    cluster, undisturbed, stored, tmp_path
):
    untouched, expected = undisturbed
    outcome = harness.finish(start(cluster))
    assert (outcome.error, outcome.variants) == ("", expected.variants), outcome.said
    assert harness.computed(cluster.home) == harness.computed(untouched)
    assert len(cluster.children()) == 2, "one of the workers computed nothing"
    assert stored(cluster.shared) == harness.outputs_of(untouched)
    third = harness.run(tmp_path / "third", environment=cluster.shared, constants=QUICK)
    assert (third.error, third.variants) == ("", expected.variants)
    assert harness.computed(tmp_path / "third") == Counter()


# How a run may end: without a scheduler, or with a server that has forgotten what it held.
KNOWN = ("is gone", "missing from the shared store", "does not show")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.timeout(1800)
def test_whatever_is_killed_at_random_the_results_are_the_same(seed, cluster, server, undisturbed, stored):
    untouched, expected = undisturbed
    rng = random.Random(seed)
    for _ in range(3):
        victim = rng.choice(["a", "b", "scheduler", "driver", "server"])
        run = start(cluster)
        time.sleep(rng.uniform(1, 15))
        if victim == "driver":
            run.kill()
        elif victim == "server":  # It forgets all that it held.
            server.kill()
            server.start()
        else:
            cluster.replace(victim)
        outcome = harness.finish(run)
        assert outcome.exitcode in {0, -9}
        assert outcome.error == "" or any(part in outcome.error for part in (server.url, *KNOWN)), outcome.error
        cluster.wait("a", "b")
    outcome = harness.finish(start(cluster))
    if outcome.error and victim == "server":  # It was killed at the end of the last run.
        outcome = harness.finish(start(cluster))
    assert (outcome.error, outcome.variants) == ("", expected.variants), outcome.said
    found, wanted = stored(cluster.shared), harness.outputs_of(untouched)
    assert found.items() <= wanted.items()
    assert set(harness.keys_done(cluster.home).values()) >= wanted.keys()


@pytest.fixture
def network():
    with open_network() as found:
        yield found


@pytest.fixture
def distant(network, tmp_path):
    """The same workers, each in a network namespace of its own."""
    with object_server.serving(network.address) as server:
        for name in "ab":
            network.add(name)
        found = Cluster(tmp_path, network.address, object_server.environment(server, "p"))
        yield from started(found, {name: network.on(name) for name in "ab"})


def test_a_machine_whose_link_is_down_is_done_without_and_comes_back(distant, network, undisturbed, stored):
    untouched, expected = undisturbed
    run = start(distant)
    until(lambda: num_done(distant) >= 5, 200, distant.logs)
    network.cut("a")
    outcome = harness.finish(run)
    assert (outcome.error, outcome.variants) == ("", expected.variants), outcome.said
    assert stored(distant.shared) == harness.outputs_of(untouched)
    distant.wait("b")
    network.restore("a")
    distant.wait("a", "b")
    distant.kill("b")
    distant.wait("a")
    again = harness.finish(start(distant, recipe=harness.RECIPE | {"name": "again", "seed": 5}))
    assert again.error == "", again.said
    assert not all(again.stages.values())


# The worker's own view of the file system, in which a folder is empty.
WITHOUT = 'mount -t tmpfs tmpfs "$0" && exec "$@"'


@pytest.fixture
def images(image_folder, tmp_path):
    """A dataset in a folder of its own."""
    return shutil.copytree(image_folder, tmp_path / "disk" / "images")


@pytest.fixture
def lacking(server, tmp_path, images):
    """The workers a, and b, on whose machine there is no dataset."""
    found = Cluster(tmp_path, shared=object_server.environment(server, "p"))
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs the right to make mount namespaces")
    yield from started(found, {"a": (), "b": ("unshare", "-m", "sh", "-c", WITHOUT, str(images.parent))})


def test_a_machine_without_the_dataset_computes_what_does_not_read_it(lacking, images, stored, tmp_path):
    data = {"format": "imagefolder", "root": str(images), "resize": 16, "crop": 16}
    recipe = harness.RECIPE | {"data": data, "evaluation": {"num_held_out": 6}, "qat": []}
    recipe |= {"calibration": {"batch_size": 8, "num_batches": 2}}
    alone = harness.run(tmp_path / "alone", recipe=recipe)
    assert alone.error == ""
    outcome = harness.finish(start(lacking, recipe=recipe))
    assert (outcome.error, outcome.variants) == ("", alone.variants), outcome.said
    assert stored(lacking.shared) == harness.outputs_of(tmp_path / "alone")
    assert len(lacking.children()) == 2, "one of the workers computed nothing"
    lacking.kill("a")
    lacking.wait("b")
    failed = harness.finish(start(lacking, recipe=recipe | {"seed": 6, "name": "more"}))
    assert f"b: it lacks {images}" in failed.error
