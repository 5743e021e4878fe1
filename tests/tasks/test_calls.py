"""Calls that run at once: their results, their notes, and what happens when one fails."""

import threading

import pytest

from tasks.calls import Calls, StoppedError

BOTH = pytest.mark.parametrize("at_once", [False, True])


@pytest.fixture
def calls():
    made = Calls(at_once=True)
    yield made
    made.end()


@BOTH
def test_notes_are_in_the_order_in_which_calls_were_begun(at_once):
    calls, last_is_done = Calls(at_once=at_once), threading.Event()

    def work(name, parts):
        if name == "a" and at_once:
            assert last_is_done.wait(10)
        calls.note(f"{name}0")
        waits = [calls.begin(lambda part=part: calls.note(f"{name}{part}")) for part in parts]
        calls.note(f"{name}9")
        for wait in waits:
            wait()
        if name == "b":
            last_is_done.set()
        return name

    waits = [calls.begin(lambda name=name: work(name, "123")) for name in "ab"]
    assert [wait() for wait in waits] == ["a", "b"]
    calls.note("end")
    assert calls.notes == [*(f"{name}{part}" for name in "ab" for part in "01239"), "end"]


@BOTH
def test_a_shared_call_is_made_once_and_noted_where_it_would_be_first(at_once):
    calls, made = Calls(at_once=at_once), []

    def share():
        made.append(1)
        calls.note("shared")
        return 7

    def work(name):
        calls.note(f"{name}-before")
        found = calls.once("share", share)
        calls.note(f"{name}-after")
        return found

    waits = [calls.begin(lambda name=name: work(name)) for name in "abc"]
    assert [wait() for wait in waits] == [7, 7, 7]
    assert made == [1]
    assert calls.notes == ["a-before", "shared", "a-after", "b-before", "b-after", "c-before", "c-after"]


def test_calls_run_beside_each_other(calls):
    both = threading.Barrier(2, timeout=10)
    waits = [calls.begin(both.wait) for _ in range(2)]
    assert sorted(wait() for wait in waits) == [0, 1]


def test_an_error_stops_the_others_and_is_what_every_caller_gets(calls):
    failed = threading.Event()

    def fail():
        failed.set()
        raise ValueError("broken")

    def go_on():
        assert failed.wait(10)
        while True:
            calls.check()

    waits = [calls.begin(go_on), calls.begin(fail), calls.begin(lambda: calls.once("shared", go_on))]
    for wait in waits:
        with pytest.raises(ValueError, match="broken"):
            wait()


def test_calls_that_nobody_waits_for_are_stopped_at_the_end(calls):
    stopped = threading.Event()

    def go_on():
        try:
            while True:
                calls.check()
        except StoppedError:
            stopped.set()
            raise

    calls.begin(go_on)
    calls.end()
    assert stopped.is_set()


def test_the_end_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr("tasks.calls._END_SECONDS", 0.1)
    calls, release = Calls(at_once=True), threading.Event()
    calls.begin(lambda: release.wait(60))
    calls.end()
    assert not release.is_set()
    release.set()
