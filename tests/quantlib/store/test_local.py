import hashlib
import json
import os
import stat
import threading

import pytest
from filelock import FileLock

from quantlib.errors import MachineError, StoreError
from quantlib.files import write_atomically
from quantlib.store.artifacts import Record, Ref


def record(key, *refs):
    return Record(key, "fuse", {"stage": "fuse"}, refs, 0.5, "2026-01-01T00:00:00+00:00")


def test_what_was_put_is_read_and_named_by_its_content(store):
    ref = store.put("model", b"weights")
    assert store.read(ref) == b"weights"
    assert ref == Ref("model", hashlib.sha256(b"weights").hexdigest(), 7)
    assert store.path(ref).name == ref.sha256


def test_the_same_bytes_are_stored_once(store):
    first, second = store.put("a", b"same"), store.put("b", b"same")
    assert store.path(first) == store.path(second)
    assert len([p for p in (store.folder / "blobs").rglob("*") if p.is_file()]) == 1


@pytest.mark.parametrize("damage", [b"", b"weigh", b"weightz", b"weights and more"])
def test_a_damaged_artifact_is_never_read(store, damage):
    ref = store.put("model", b"weights")
    path = store.path(ref)
    path.chmod(0o644)
    path.write_bytes(damage)
    assert not store.holds(ref)
    with pytest.raises(StoreError, match="damaged"):
        store.read(ref)


def test_damage_is_noticed_though_the_artifact_was_verified_before(store):
    ref = store.put("model", b"weights")
    assert store.holds(ref)
    path = store.path(ref)
    path.unlink()
    path.write_bytes(b"weightz")
    assert not store.holds(ref)


def test_putting_a_damaged_artifact_again_repairs_it(store):
    ref = store.put("model", b"weights")
    store.path(ref).unlink()
    assert store.put("model", b"weights") == ref
    assert store.read(ref) == b"weights"


def test_a_writer_that_fails_leaves_nothing(store):
    def fill(file):
        file.write(b"half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        store.write("model", fill)
    assert [p for p in store.folder.rglob("*") if p.is_file()] == []


def test_a_full_disk_is_an_error_that_says_what_to_do(store, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="disk is full"):
        store.put("model", b"weights")
    assert [p for p in store.folder.rglob("*") if p.is_file()] == []


def test_a_record_is_found_with_its_artifacts_and_not_without(store):
    ref = store.put("model", b"weights")
    store.add_record(record("k" * 64, ref))
    assert store.find_record("k" * 64) == record("k" * 64, ref)
    store.path(ref).unlink()
    assert store.find_record("k" * 64) is None
    assert store.read_record("k" * 64) == record("k" * 64, ref)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"outputs": [{"kind": 1}]}', b"\xff"])
def test_a_damaged_record_counts_as_missing(store, content):
    ref = store.put("model", b"weights")
    store.add_record(record("key", ref))
    path = store.folder / "records" / "key.json"
    path.chmod(0o644)
    path.write_bytes(content)
    assert store.find_record("key") is None


def test_a_record_with_any_byte_changed_counts_as_missing(store):
    whole = record("key", store.put("model", b"weights"))
    store.add_record(whole)
    path = store.folder / "records" / "key.json"
    content = path.read_bytes()
    path.chmod(0o644)
    for place in range(len(content)):
        for changed in (content[place] ^ 1, content[place] ^ 4):
            path.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
            # White space between the fields may differ.
            assert store.read_record("key") in ([None, whole] if content[place] in b" \n" else [None])


def test_a_record_of_an_earlier_release_which_has_no_hash_is_read(store):
    whole = record("key", store.put("model", b"weights"))
    store.add_record(whole)
    path = store.folder / "records" / "key.json"
    path.chmod(0o644)
    fields = json.loads(path.read_bytes())
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    assert store.find_record("key") == whole


def test_a_record_under_another_key_counts_as_missing(store):
    store.add_record(record("key", store.put("model", b"weights")))
    (store.folder / "records" / "key.json").rename(store.folder / "records" / "other.json")
    assert store.find_record("other") is None


def test_an_artifact_that_is_laid_out_outlives_the_store(store, tmp_path):
    ref = store.put("torchscript", b"file")
    place = store.copy_out(ref, tmp_path / "models" / "run" / "float.pt")
    store.path(ref).unlink()
    assert place.read_bytes() == b"file"


def test_nothing_is_freed_while_the_store_is_in_use(store):
    with store.in_use(), store.in_use(), pytest.raises(MachineError, match="A flow is running"), store.freeing():
        pass
    with store.freeing():
        pass


@pytest.fixture
def umask():
    before = os.umask(0)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022, 0o002])
def test_the_umask_decides_who_may_read_and_an_artifact_is_changed_by_nobody(store, tmp_path, umask, mask):
    umask(mask)
    ref = store.put("model", b"weights")
    store.add_record(record("key", ref))
    with store.in_use():
        pass
    kept = [store.path(ref), store.folder / "records" / "key.json"]
    own = [store.copy_out(ref, tmp_path / "models" / "int8.pt"), store.folder / "in-use"]
    for paths, mode in ((kept, 0o444), (own, 0o666)):
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {mode & ~mask}


@pytest.mark.parametrize("name", ["in-use", "locks/key"])
def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_is_left_alone(store, tmp_path, name):
    (tmp_path / "thesis").write_text("years of work")
    (store.folder / "locks").mkdir(parents=True)
    for target in ("thesis", "nothing"):
        (store.folder / name).symlink_to(tmp_path / target)
        use_lock = store.in_use if name == "in-use" else lambda: FileLock(store.lock_file("key"))
        with pytest.raises(MachineError, match=f"{name} is a symbolic link.* Remove it"), use_lock():
            pass
        (store.folder / name).unlink()
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "a named pipe"), (os.mkdir, "a folder")])
def test_a_lock_that_is_no_file_is_refused(store, make, kind):
    (store.folder / "locks").mkdir(parents=True)
    make(store.folder / "in-use")
    make(store.folder / "locks" / "key")
    with pytest.raises(MachineError, match=f"in-use is {kind}"), store.freeing():
        pass
    with pytest.raises(MachineError, match=f"key is {kind}"):
        store.lock_file("key")


def endless(path):
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, endless])
def test_what_is_no_file_among_artifacts_and_records_counts_as_damage(store, make):
    refs = store.put("model", b"weights"), store.put("empty", b"")
    store.add_record(record("whole", *refs))
    store.add_record(record("key", *refs))
    for path in (*map(store.path, refs), store.folder / "records" / "key.json"):
        path.unlink()
        make(path)
    make(store.folder / "records" / "other.json")
    for ref in refs:
        assert not store.holds(ref)
        with pytest.raises(StoreError):
            store.read(ref)
    assert store.read_record("key") is None
    assert [found.key for found in store.records()] == ["whole"]
    assert store.find_record("whole") is None


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkfifo, endless])
def test_what_is_no_file_among_artifacts_and_records_is_replaced_and_freed(store, make):
    ref = Ref("model", hashlib.sha256(b"weights").hexdigest(), 7)
    place = store.folder / "blobs" / ref.sha256[:2]
    place.mkdir(parents=True)
    make(place / ref.sha256)
    assert store.put("model", b"weights") == ref
    assert store.read(ref) == b"weights"
    make(place / ("0" * 64))
    with store.freeing():
        assert store.remove_blobs_except({ref.sha256}) == [0]
    assert [path.name for path in place.iterdir()] == [ref.sha256]


def test_a_folder_in_the_place_of_an_artifact_is_named(store):
    (store.folder / "blobs" / hashlib.sha256(b"weights").hexdigest()[:2]).mkdir(parents=True)
    (
        store.folder / "blobs" / hashlib.sha256(b"weights").hexdigest()[:2] / hashlib.sha256(b"weights").hexdigest()
    ).mkdir()
    with pytest.raises(MachineError, match="is a folder.* Remove it"):
        store.put("model", b"weights")


def test_a_reader_sees_the_old_file_or_the_new_and_never_a_part(tmp_path):
    path, contents = tmp_path / "file", [b"a" * 100_000, b"b" * 100_000]
    write_atomically(path, contents[0])
    seen = set()
    stop = threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        write_atomically(path, contents[number % 2])
    stop.set()
    reader.join()
    assert seen <= set(contents)


def test_a_record_nested_deeper_than_any_parser_goes_is_damaged_as_any_other(store):
    (store.folder / "records").mkdir(parents=True)
    (store.folder / "records" / "deep.json").write_text('{"key": ' * 100_000)
    assert store.read_record("deep") is None
    assert list(store.records()) == []
