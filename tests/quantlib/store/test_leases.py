import json
import threading
import time

import pytest

from quantlib.errors import MachineError
from quantlib.store import leases
from quantlib.store.folder import FolderObjects

NAME = "leases/key"


@pytest.fixture
def objects(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "TIME_TO_LIVE_S", 0.6)
    (tmp_path / "shared").mkdir()
    return FolderObjects(tmp_path / "shared")


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def seconds_waited(monkeypatch):
    """How long taking the lease takes, by the waiter's clock."""

    def measure(objects):
        clock = Clock()
        monkeypatch.setattr(leases, "time", clock)
        take(objects)
        return clock.now - 1000.0

    return measure


def take(objects):
    with leases.hold(objects, NAME, "other run"):
        pass


def in_background(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_a_lease_says_who_has_it_and_is_renewed_while_it_is_held(objects):
    with leases.hold(objects, NAME, "my run") as held:
        before = leases.read_lease(objects.get(NAME))
        time.sleep(0.4)
        after = leases.read_lease(objects.get(NAME))
        assert (after.run, after.owner) == ("my run", before.owner)
        assert after.sequence > before.sequence
        assert held.is_held()
    assert leases.read_lease(objects.get(NAME)).owner == ""


def test_a_lease_that_is_renewed_is_not_taken_over(objects):
    with leases.hold(objects, NAME, "my run"):
        waiting = in_background(lambda: take(objects))
        waiting.join(4 * leases.TIME_TO_LIVE_S)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_lease_that_is_not_renewed_is_taken_over_and_its_holder_notices(objects, monkeypatch):
    answers = threading.Event()
    renew = leases.Held.renew

    def renew_if_not_cut_off(self):
        answers.wait()
        renew(self)

    monkeypatch.setattr(leases.Held, "renew", renew_if_not_cut_off)
    with leases.hold(objects, NAME, "my run") as held, leases.hold(objects, NAME, "other run") as other:
        assert not held.is_held()
        answers.set()
        held.renew()
        assert not held.is_held()
        assert other.is_held()
        held.release()
        assert leases.read_lease(objects.get(NAME)).owner == other._lease.owner


def test_a_waiter_goes_by_its_own_clock_and_starts_it_when_it_first_sees_the_lease(objects, seconds_waited):
    # As a machine leaves it that died a year ago, or whose clock is a year ahead.
    dead = leases.Lease("dead", "run", "host", 1, 7, 60.0)
    objects.create(NAME, leases.seal(leases.asdict(dead)))
    assert 60 < seconds_waited(objects) < 62
    assert seconds_waited(objects) == 0


def test_the_time_to_live_is_the_holders(objects, seconds_waited):
    dead = leases.Lease("dead", "run", "host", 1, 7, 300.0)
    objects.create(NAME, leases.seal(leases.asdict(dead)))
    assert 300 < seconds_waited(objects) < 302


@pytest.mark.parametrize("content", [b"", b"[]", json.dumps({"owner": "x"}).encode()])
def test_a_damaged_lease_is_taken_over_after_the_time_to_live(objects, content, seconds_waited):
    objects.create(NAME, content)
    assert 0.6 < seconds_waited(objects) < 0.8


class LosingAnswers:
    """Carries a replacement out, and then says that there was no answer."""

    def __init__(self, objects, num_losses):
        self._objects, self.num_losses = objects, num_losses

    def __getattr__(self, name):
        return getattr(self._objects, name)

    def impatient(self):
        return self

    def replace(self, name, content, version):
        replaced = self._objects.replace(name, content, version)
        if self.num_losses:
            self.num_losses -= 1
            raise MachineError("no answer")
        return replaced


def test_after_an_ambiguous_answer_the_owner_decides_whether_the_lease_is_still_held(objects):
    with leases.hold(LosingAnswers(objects, 2), NAME, "my run") as held:
        held.renew()
        assert held.is_held()
        held.renew()
        held.renew()
        assert held.is_held()
        assert leases.read_lease(objects.get(NAME)).owner == held._lease.owner
    assert leases.read_lease(objects.get(NAME)).owner == ""


def test_a_lease_that_was_deleted_is_lost(objects):
    with leases.hold(objects, NAME, "my run") as held:
        objects.delete(NAME)
        held.renew()
        assert not held.is_held()
    assert objects.get(NAME) is None


def test_a_release_without_an_answer_is_no_error(objects, monkeypatch):
    def fail(*_):
        raise MachineError("no answer")

    with leases.hold(objects, NAME, "my run"):
        monkeypatch.setattr(FolderObjects, "replace", fail)
    monkeypatch.undo()
    assert leases.read_lease(objects.get(NAME)).owner != ""
