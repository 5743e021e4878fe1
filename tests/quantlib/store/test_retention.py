from datetime import UTC, datetime, timedelta

import pytest

from quantlib.errors import MachineError
from quantlib.store.artifacts import Record
from quantlib.store.journal import RunFile, RunStatus
from quantlib.store.retention import find_damage, free, list_entries

NOW = datetime.now(UTC)


def run(name, days_ago, keys, state="completed"):
    started = (NOW - timedelta(days=days_ago)).isoformat()
    return RunStatus(RunFile(name, "quantize", {}, started, "host", 1, None), state, 1, "", frozenset(keys), "")


@pytest.fixture
def filled(store):
    """Three stages of 1,000 bytes each, made ten, five and one days ago; two of them name `shared`."""
    shared = store.put("model", b"s" * 1000)
    for key, days_ago in (("old", 10), ("middle", 5), ("new", 1)):
        own = store.put("model", key.encode() * 200)
        created = (NOW - timedelta(days=days_ago)).isoformat()
        outputs = (own, shared) if key != "middle" else (own,)
        store.add_record(Record(key, "fuse", {}, outputs, 1.0, created))
    return store


def keys(store):
    return {record.key for record in store.records()}


def test_entries_name_the_runs_that_used_them_the_last_used_first(filled):
    runs = [run("b", 0, ["old"]), run("a", 1, ["old", "new"])]
    entries = list_entries(filled, runs)
    assert [(entry.record.key, entry.runs) for entry in entries] == [
        ("old", ("b", "a")),
        ("new", ("a",)),
        ("middle", ()),
    ]


def test_what_no_run_used_for_long_is_freed(filled):
    freed = free(filled, [run("a", 2, ["old"])], unused_for=timedelta(days=3))
    assert keys(filled) == {"old", "new"}
    assert (freed.num_records, freed.num_blobs) == (1, 1)
    assert find_damage(filled)[1] == []


def test_the_least_recently_used_is_freed_above_a_size_and_a_shared_artifact_counts_once(filled):
    size = sum(ref.size for record in filled.records() if record.key != "middle" for ref in record.outputs) - 1000
    free(filled, [run("a", 0, ["old"])], max_size=size)
    assert keys(filled) == {"old", "new"}
    assert find_damage(filled)[1] == []


def test_what_neither_a_kept_nor_an_unfinished_run_uses_is_freed(filled):
    runs = [run("c", 0, ["new"]), run("b", 1, ["middle"]), run("a", 2, ["old"], state="crashed")]
    free(filled, runs, keep_runs=1)
    assert keys(filled) == {"new", "old"}


def test_an_artifact_that_a_kept_record_names_stays(filled):
    free(filled, [run("a", 0, ["new"])], keep_runs=1)
    assert keys(filled) == {"new"}
    assert find_damage(filled)[1] == []


def test_what_a_crash_left_unfinished_is_freed(filled):
    (filled.folder / "blobs" / ".writing-x").write_bytes(b"half")
    free(filled, [], unused_for=timedelta(days=100))
    assert not (filled.folder / "blobs" / ".writing-x").exists()
    assert keys(filled) == {"old", "middle", "new"}


def test_nothing_is_freed_while_a_flow_runs(filled):
    with filled.in_use(), pytest.raises(MachineError):
        free(filled, [], max_size=0)
    assert keys(filled) == {"old", "middle", "new"}


def test_damage_is_found_with_the_stage_it_belongs_to(filled):
    record = next(record for record in filled.records() if record.key == "middle")
    filled.path(record.outputs[0]).unlink()
    assert [(found.key, ref) for found, ref in find_damage(filled)[1]] == [("middle", record.outputs[0])]
