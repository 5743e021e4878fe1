"""What holds the objects of a shared store: both kinds do the same, also where writers race and answers are lost."""

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import object_server
import pytest

from quantlib.errors import MachineError
from quantlib.store import bucket
from quantlib.store.folder import FolderObjects
from quantlib.store.objects import check_conditions

CHUNK = 1 << 20


@pytest.fixture(params=["folder", "bucket", "bucket that loses answers"])
def objects(request, tmp_path):
    if request.param == "folder":
        (tmp_path / "shared").mkdir()
        return FolderObjects(tmp_path / "shared")
    if request.param == "bucket":
        return request.getfixturevalue("open_bucket")(request.getfixturevalue("s3"))
    proxy = request.getfixturevalue("proxy")
    rng = random.Random(0)
    troubles = ["lose", "drop", 409, 503, *[None] * 6]
    proxy.decide = lambda method, path, number: rng.choice(troubles) if method == "PUT" else None
    return request.getfixturevalue("open_bucket")(proxy)


def stored(tmp_path, content):
    path = tmp_path / "artifact"
    path.write_bytes(content)
    return path


def test_a_small_object_is_created_once_and_replaced_by_whoever_read_its_newest_version(objects):
    assert objects.get("records/a") is None
    first = objects.create("records/a", b"one")
    assert first is not None
    assert objects.create("records/a", b"two") is None
    found = objects.get("records/a")
    assert (found.content, found.version) == (b"one", first)
    second = objects.replace("records/a", b"three", first)
    assert second is not None
    assert objects.replace("records/a", b"four", first) is None
    assert objects.get("records/a").content == b"three"
    assert objects.replace("records/b", b"five", first) is None
    assert objects.get("records/b") is None


def test_an_object_that_was_replaced_often_is_still_not_created_again(objects):
    version = objects.create("leases/a", b"0")
    for number in range(1, 6):
        version = objects.replace("leases/a", b"%d" % number, version)
    assert objects.create("leases/a", b"new") is None
    assert objects.get("leases/a").content == b"5"


def test_of_writers_that_race_one_wins_and_its_content_stands(objects):
    with ThreadPoolExecutor(8) as pool:
        for round_ in range(6):
            name = f"records/{round_}"
            created = list(pool.map(lambda n, name=name: objects.create(name, b"c%d" % n), range(8)))
            (winner,) = (number for number, version in enumerate(created) if version is not None)
            found = objects.get(name)
            assert (found.content, found.version) == (b"c%d" % winner, created[winner])
            replaced = list(
                pool.map(lambda n, name=name, v=found.version: objects.replace(name, b"r%d" % n, v), range(8))
            )
            (winner,) = (number for number, version in enumerate(replaced) if version is not None)
            assert objects.get(name).content == b"r%d" % winner


def test_counting_with_replacements_loses_no_step(objects):
    objects.create("runs/count", b"0")
    num_steps = 10

    def count(_):
        for _ in range(num_steps):
            while True:
                found = objects.get("runs/count")
                # Unique content, as leases and records have it.
                content = b"%d %s" % (int(found.content.split()[0]) + 1, os.urandom(4).hex().encode())
                if objects.replace("runs/count", content, found.version) is not None:
                    break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    # More, where a writer was not told that it had won before the next one won.
    assert int(objects.get("runs/count").content.split()[0]) >= 4 * num_steps


@pytest.mark.parametrize("size", [0, 5, 7 * CHUNK + 3])
def test_an_artifact_comes_back_as_it_was_uploaded(objects, tmp_path, size):
    content = os.urandom(size)
    assert objects.size("blobs/ab/abc") is None
    with pytest.raises(FileNotFoundError):
        list(objects.download("blobs/ab/abc", 5))
    objects.upload("blobs/ab/abc", stored(tmp_path, content))
    assert objects.size("blobs/ab/abc") == size
    assert b"".join(objects.download("blobs/ab/abc", size)) == content


def test_objects_are_listed_by_folder_and_deleted(objects, tmp_path):
    objects.create("records/a", b"12")
    objects.replace("records/a", b"123", objects.get("records/a").version)
    objects.create("leases/a", b"1")
    objects.upload("blobs/ab/abc", stored(tmp_path, b"1234"))
    assert list(objects.list("records")) == [("records/a", 3)]
    assert list(objects.list("blobs")) == [("blobs/ab/abc", 4)]
    assert list(objects.list("runs")) == []
    for name in ("records/a", "blobs/ab/abc", "records/never"):
        objects.delete(name)
    assert list(objects.list("records")) == list(objects.list("blobs")) == []
    assert objects.get("records/a") is None
    assert objects.create("records/a", b"1") is not None


def test_what_keeps_conditions_passes_the_check_and_leaves_nothing(objects):
    for _ in range(3):
        check_conditions(objects)
    assert list(objects.list("probes")) == []


def test_a_server_that_ignores_conditions_is_refused(proxy, open_bucket):
    proxy.decide = lambda method, path, number: "ignore"
    with pytest.raises(MachineError, match=f"at {proxy.url} ignores the conditions of writes .* 8 created one"):
        check_conditions(open_bucket(proxy))


def test_a_server_that_looks_first_and_writes_then_is_refused(proxy, open_bucket):
    # In turn, it would pass: only writers at the same moment reveal it.
    together = threading.Barrier(8)

    def decide(method, path, number):
        if method == "PUT":
            together.wait(timeout=30)
            return "ignore"
        return None

    proxy.decide = decide
    with pytest.raises(MachineError, match="ignores the conditions of writes"):
        check_conditions(open_bucket(proxy))


def test_a_server_that_stays_away_is_named_and_one_that_comes_back_is_waited_for(proxy, open_bucket, monkeypatch):
    monkeypatch.setattr(bucket, "_FIRST_PATIENCE_S", 0.5)
    proxy.decide = lambda method, path, number: "drop"
    with pytest.raises(MachineError, match=f"s3://bucket/.* at {proxy.url} has not answered for .* `quantflow resume`"):
        open_bucket(proxy).create("records/a", b"1")
    start = proxy.num_requests
    proxy.decide = lambda method, path, number: "drop" if number < start + 4 else None
    monkeypatch.setattr(bucket, "_FIRST_PATIENCE_S", 60.0)
    assert open_bucket(proxy).create("records/b", b"1") is not None


@pytest.mark.parametrize("status", [400, 403])
def test_a_refusal_is_not_repeated(proxy, open_bucket, status):
    proxy.decide = lambda method, path, number: status
    with pytest.raises(MachineError, match="refuses .* check the bucket, the credentials"):
        open_bucket(proxy).create("records/a", b"1")
    assert proxy.num_requests == 1


def test_a_bucket_that_does_not_exist_is_an_error(s3, open_bucket, monkeypatch):
    monkeypatch.setattr(object_server, "BUCKET", "elsewhere")
    with pytest.raises(MachineError, match=r"refuses \(NoSuchBucket"):
        open_bucket(s3).create("records/a", b"1")


def test_an_impatient_request_is_asked_once(proxy, open_bucket):
    objects = open_bucket(proxy)
    objects.create("records/a", b"1")
    before = proxy.num_requests
    proxy.decide = lambda method, path, number: 503
    with pytest.raises(MachineError):
        objects.impatient().get("records/a")
    assert proxy.num_requests == before + 1


# Folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shared").mkdir()
    return FolderObjects(tmp_path / "shared")


def test_a_link_that_was_made_although_the_answer_says_it_exists_counts(folder, monkeypatch):
    link = os.link

    def link_twice(source, place):
        link(source, place)
        link(source, place)  # As NFS does when the first answer is lost.

    monkeypatch.setattr(os, "link", link_twice)
    assert folder.create("records/a", b"1") == 1
    assert folder.replace("records/a", b"2", 1) == 2
    assert folder.get("records/a").content == b"2"


def test_a_slow_writer_does_not_win_with_a_number_that_was_used_and_removed(folder, monkeypatch):
    for number in range(5):
        folder.create("leases/a", b"0") if number == 0 else folder.replace("leases/a", b"%d" % number, number)
    newest = FolderObjects._newest
    answers = [2]  # What a writer saw that then was paused while others wrote.
    monkeypatch.setattr(FolderObjects, "_newest", lambda self, name: answers.pop() if answers else newest(self, name))
    assert folder.replace("leases/a", b"late", 2) is None
    assert folder.get("leases/a").content == b"4"
    assert folder.replace("leases/a", b"5", 5) == 6


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "is full: free some space there"), (errno.EIO, r"cannot be used \(.*\): check that it is mounted")],
)
def test_a_refusal_of_the_file_system_names_the_shared_folder(folder, monkeypatch, number, message):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MachineError, match=f"The shared store {folder.place} {message}"):
        folder.create("records/a", b"1")
    assert list(folder.list("incoming")) == []
    monkeypatch.undo()
    assert folder.create("records/a", b"1") is not None


def test_files_that_are_not_versions_are_passed_over(folder):
    folder.create("records/a", b"1")
    (folder.folder / "records" / "a" / ".nfs0001").write_bytes(b"")
    assert folder.get("records/a").content == b"1"
    assert list(folder.list("records")) == [("records/a", 1)]
    assert folder.replace("records/a", b"2", 1) == 2
