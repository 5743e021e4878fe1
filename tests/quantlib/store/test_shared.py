"""A store that machines share: each test's homes stand for machines."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from quantlib.errors import MachineError, StoreError
from quantlib.recipe.schema import parse_recipe
from quantlib.store import leases, retention
from quantlib.store.artifacts import Record, Ref
from quantlib.store.folder import FolderObjects
from quantlib.store.journal import Journal
from quantlib.store.opening import open_store
from quantlib.store.shared import SharedStore

RECIPE = parse_recipe(
    {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
)


@pytest.fixture
def shared(tmp_path):
    (tmp_path / "shared").mkdir()
    return FolderObjects(tmp_path / "shared")


@pytest.fixture(params=["folder", "bucket"])
def machines(request, tmp_path):
    """Opens the shared store on a machine."""
    if request.param == "folder":
        (tmp_path / "shared").mkdir()
        objects = FolderObjects(tmp_path / "shared")
    else:
        objects = request.getfixturevalue("open_bucket")(request.getfixturevalue("s3"))
    return lambda name: SharedStore(tmp_path / name / "store", objects)


@pytest.fixture
def short_lives(monkeypatch):
    monkeypatch.setattr(leases, "TIME_TO_LIVE_S", 0.6)


def record(store, content=b"weights", key="key", **other):
    return Record(
        key, "fuse", {"stage": "fuse"}, (store.put("model", content),), 1.0, "2026-01-01T00:00:00+00:00", **other
    )


def blob(tmp_path, ref):
    return tmp_path / "shared" / "blobs" / ref.sha256[:2] / ref.sha256


def overwrite(path, content):
    path.chmod(0o644)
    path.write_bytes(content)


# Records and artifacts


def test_what_one_machine_stores_another_finds_and_reads(machines):
    here, there = machines("here"), machines("there")
    stored = record(here)
    assert there.find_record("key") is None
    assert here.add_record(stored) == stored
    assert there.find_record("key") == stored
    assert there.read(stored.outputs[0]) == b"weights"
    assert there.path(stored.outputs[0]).is_relative_to(there.folder)
    assert there.read_json(there.put_json("numbers", [1, 2])) == [1, 2]
    assert list(there.records()) == [stored]


def test_who_comes_second_adopts_the_record_that_stands(machines):
    here, there = machines("here"), machines("there")
    first, second = record(here, b"first"), record(there, b"second")
    assert here.add_record(first) == first
    assert there.add_record(second) == first
    assert here.find_record("key") == there.find_record("key") == first


def test_of_machines_that_finish_at_once_all_continue_from_one_record(machines):
    stores = [machines(f"machine {number}") for number in range(6)]
    for round_ in range(5):
        made = [record(store, b"%d %d" % (round_, n), f"key {round_}") for n, store in enumerate(stores)]
        with ThreadPoolExecutor(len(stores)) as pool:
            standing = list(pool.map(SharedStore.add_record, stores, made))
        assert len(set(map(repr, standing))) == 1
        assert standing[0] in made


def test_an_artifact_is_downloaded_once_and_again_when_the_cache_is_damaged(shared, tmp_path, monkeypatch):
    here, there = (SharedStore(tmp_path / name, shared) for name in ("here", "there"))
    ref = here.put("model", b"weights")
    downloads = []
    download = FolderObjects.download
    monkeypatch.setattr(
        FolderObjects, "download", lambda self, *named: downloads.append(named) or download(self, *named)
    )
    assert [there.read(ref), there.read(ref)] == [b"weights"] * 2
    assert len(downloads) == 1
    overwrite(there.path(ref), b"WEIGHTS")
    assert SharedStore(tmp_path / "there", shared).read(ref) == b"weights"
    assert len(downloads) == 2


def test_an_artifact_that_is_there_is_not_uploaded_again(shared, tmp_path, monkeypatch):
    uploads = []
    upload = FolderObjects.upload
    monkeypatch.setattr(FolderObjects, "upload", lambda self, *named: uploads.append(named) or upload(self, *named))
    here, there = (SharedStore(tmp_path / name, shared) for name in ("here", "there"))
    refs = {store.put("model", b"weights") for store in (here, there, here)}
    assert len(refs) == len(uploads) == 1


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut short": lambda path: overwrite(path, path.read_bytes()[:3]),
    "changed": lambda path: overwrite(path, b"WEIGHTS"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_is_never_read_and_its_record_is_replaced(damage, shared, tmp_path):
    here, there, third = (SharedStore(tmp_path / name, shared) for name in ("here", "there", "third"))
    first = record(here)
    here.add_record(first)
    DAMAGES[damage](blob(tmp_path, first.outputs[0]))
    with pytest.raises(StoreError, match=f"shared store {shared.place}.* Run the recipe again"):
        there.read(first.outputs[0])
    assert there.find_record("key") is None
    second = record(there, b"other weights")
    assert there.add_record(second) == second
    assert third.find_record("key") == second
    assert third.read(second.outputs[0]) == b"other weights"
    # The machine that has the first one's artifact adopts the second, too.
    assert here.add_record(first) == second


def test_a_record_whose_artifact_is_made_again_stands(shared, tmp_path):
    here, there = (SharedStore(tmp_path / name, shared) for name in ("here", "there"))
    first = record(here)
    here.add_record(first)
    blob(tmp_path, first.outputs[0]).unlink()
    assert there.find_record("key") is None
    second = replace(record(there), seconds=2.0)
    assert there.add_record(second) == first


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"key": "other"}'])
def test_a_damaged_record_is_replaced(content, shared, tmp_path):
    here = SharedStore(tmp_path / "here", shared)
    shared.create("records/key", content)
    assert here.find_record("key") is None
    stored = record(here)
    assert here.add_record(stored) == stored
    assert here.find_record("key") == stored


def test_what_was_garbled_on_the_way_is_downloaded_again(shared, tmp_path, monkeypatch):
    here, there = (SharedStore(tmp_path / name, shared) for name in ("here", "there"))
    ref = here.put("model", b"weights")
    answers = [[b"WEIGHTS"], [b"wei", b"ghts"]]
    monkeypatch.setattr(FolderObjects, "download", lambda *_: answers.pop(0))
    assert there.read(ref) == b"weights"
    assert answers == []


def test_verification_reads_every_shared_artifact_and_keeps_no_copy(shared, tmp_path):
    here, there = (SharedStore(tmp_path / name, shared) for name in ("here", "there"))
    whole, damaged = record(here, b"one", "key one"), record(here, b"two", "key two")
    here.add_record(whole)
    here.add_record(damaged)
    overwrite(blob(tmp_path, damaged.outputs[0]), b"TWO")
    assert retention.find_damage(there) == (2, [(damaged, damaged.outputs[0])])
    assert not there.folder.exists()
    assert there.find_record("key two") is None


# Computing


def test_a_stage_is_computed_by_one_machine_at_a_time(machines):
    stores = [machines(f"machine {number}") for number in range(4)]
    computed = []

    def compute(store):
        if store.find_record("key") is None:
            with store.computing("key", "run"):
                if store.find_record("key") is None:
                    computed.append(store)
                    time.sleep(0.3)
                    store.add_record(record(store, os.urandom(8)))

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(compute, stores))
    assert len(computed) == 1
    assert len({store.find_record("key").outputs for store in stores}) == 1


def test_a_failed_stage_gives_its_lease_back_at_once(machines, monkeypatch):
    with pytest.raises(ValueError, match="failed"), machines("here").computing("key", "run"):
        raise ValueError("failed")
    monkeypatch.setattr(leases, "_MAX_POLL_S", None)  # Waiting would be an error.
    with machines("there").computing("key", "run"):
        pass


# Deleting


def run_on(store, tmp_path, name, keys=()):
    """A finished run that used records."""
    journal = Journal(tmp_path / name)
    with journal.record("quantize", RECIPE, None), store.in_use(journal):
        for key in keys:
            journal.stage_started(key, key)
            journal.stage_finished(key, key, cached=True)


def test_the_runs_of_all_machines_are_known(machines, tmp_path):
    here, there = machines("here"), machines("there")
    here.add_record(record(here))
    run_on(there, tmp_path, "their run", ["key"])
    (status,) = here.other_runs()
    assert (status.file.run_id, status.state, status.keys) == ("their run", "completed", frozenset({"key"}))
    (entry,) = retention.list_entries(here, [])
    assert entry.runs == ("their run",)


def test_what_newest_and_unfinished_runs_of_other_machines_use_is_kept(machines, tmp_path):
    here, there = machines("here"), machines("there")
    for key in ("old", "new", "unfinished", "unused"):
        here.add_record(record(here, key.encode(), key))
    with pytest.raises(ValueError, match="broken"):
        fail_on(there, tmp_path, "a failed run", "unfinished")
    run_on(there, tmp_path, "old run", ["old"])
    run_on(there, tmp_path, "new run", ["new"])
    freed = retention.free(here, [], keep_runs=1)
    assert (freed.num_records, freed.num_blobs) == (2, 2)
    assert {found.key for found in there.records()} == {"new", "unfinished"}
    assert {status.file.run_id for status in there.other_runs()} == {"new run", "a failed run"}
    assert there.read(there.find_record("new").outputs[0]) == b"new"
    assert not here._cache.holds(Ref("model", record(there, b"unused").outputs[0].sha256, 6))


def fail_on(store, tmp_path, name, key):
    journal = Journal(tmp_path / name)
    with journal.record("quantize", RECIPE, None), store.in_use(journal):
        journal.stage_started(key, key)
        raise ValueError("broken")


def test_nothing_is_freed_while_a_run_goes_on_on_another_machine(machines, tmp_path, short_lives):
    here, there = machines("here"), machines("there")
    here.add_record(record(here))
    journal = Journal(tmp_path / "their run")
    with (
        journal.record("quantize", RECIPE, None),
        there.in_use(journal),
        pytest.raises(MachineError, match="Run their run is going on on machine .* try again when it has ended"),
    ):
        retention.free(here, [], unused_for=timedelta(0))
    assert here.find_record("key") is not None
    assert retention.free(here, [], unused_for=timedelta(0)).num_records == 1
    assert here.find_record("key") is None


def test_a_run_that_starts_while_another_machine_deletes_waits_for_it(machines, tmp_path):
    here, there = machines("here"), machines("there")
    journal = Journal(tmp_path / "their run")
    began = threading.Event()

    def run():
        with journal.record("quantize", RECIPE, None), there.in_use(journal):
            began.set()

    thread = threading.Thread(target=run)
    with here.freeing():
        thread.start()
        assert not began.wait(0.5)
    assert began.wait(10)
    thread.join()


RUN_AND_WAIT = """
import sys, time
from pathlib import Path
from quantlib.recipe.schema import parse_recipe
from quantlib.store import leases
from quantlib.store.journal import Journal
from quantlib.store.opening import open_store
leases.TIME_TO_LIVE_S = 0.6
tables = {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
recipe, home = parse_recipe(tables), Path(sys.argv[1])
journal, store = Journal(home / "runs" / "their run"), open_store(home)
with journal.record("quantize", recipe, None), store.in_use(journal):
    journal.stage_started("fuse", "key")
    with store.computing("other key", journal.run_id):
        time.sleep(0.3)
        print("begun", flush=True)
        time.sleep(600)
"""


def test_a_run_that_died_keeps_what_it_used_and_stops_nobody(shared, tmp_path, short_lives, monkeypatch):
    monkeypatch.setenv("QUANTFLOW_STORE", shared.place)
    here = open_store(tmp_path / "here")
    for key in ("key", "another"):
        here.add_record(record(here, key.encode(), key))
    process = subprocess.Popen([sys.executable, "-c", RUN_AND_WAIT, tmp_path / "there"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with here.computing("other key", "run"):
        pass
    freed = retention.free(here, [], keep_runs=0)
    assert [found.key for found in here.records()] == ["key"]
    assert freed.num_records == 1
    (status,) = here.other_runs()
    assert status.state == "crashed"


def test_a_machine_that_was_paused_while_it_deleted_deletes_no_more(machines, short_lives):
    here, there = machines("here"), machines("there")
    here.add_record(record(here))
    with here.freeing():
        here._freeing._lost = True
        with pytest.raises(MachineError, match="was paused, or cut off"):
            here.remove_record("key")
    assert there.find_record("key") is not None
