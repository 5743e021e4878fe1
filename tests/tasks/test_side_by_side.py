"""Branches side by side: who computes where, and what becomes of the others when one fails."""

import os
import signal
import threading
import time

import pytest
import torch

from quantlib import machine
from tasks import side_by_side as sut
from tasks.side_by_side import StoppedError, aside, beside, in_turn, is_stopped, later, one_by_one, side_by_side


@pytest.fixture(autouse=True)
def a_core_to_spare(monkeypatch):
    monkeypatch.setattr(machine, "num_cores", lambda: torch.get_num_threads() + 1)


def test_branches_run_in_threads_and_compute_in_turn_in_the_thread_that_waits():
    here, computing, most = threading.get_ident(), 0, 0

    def compute():
        nonlocal computing, most
        computing += 1
        most = max(most, computing)
        time.sleep(0.01)
        computing -= 1
        return threading.get_ident()

    def branch():
        return threading.get_ident(), [in_turn(compute) for _ in range(3)]

    found = side_by_side([branch] * 4)
    assert len({ident for ident, _ in found} | {here}) == 5
    assert {ident for _, computed in found for ident in computed} == {here}
    assert most == 1


def test_results_are_in_the_order_of_the_branches_whichever_ends_first():
    first_ends = threading.Event()

    def slow():
        assert first_ends.wait(30)
        return "slow"

    def fast():
        first_ends.set()
        return "fast"

    assert side_by_side([slow, fast]) == ["slow", "fast"]


def test_what_is_aside_computes_in_another_process_while_a_stage_computes_here():
    met = threading.Barrier(2, timeout=60)

    def converts():
        pid = beside(lambda: aside(os.getpid))
        met.wait()
        return pid

    def trains():
        return in_turn(lambda: met.wait() >= 0)

    pid, trained = side_by_side([converts, trains])
    assert pid != os.getpid()
    assert trained


def test_later_goes_on_beside_its_branch_and_may_compute():
    def branch():
        begun = threading.Event()
        waits = later(lambda: begun.wait(30) and in_turn(lambda: "measured"))
        assert not waits.done()
        begun.set()
        return waits.result()

    assert side_by_side([branch]) == ["measured"]


@pytest.mark.parametrize("run_all", [one_by_one, side_by_side])
def test_one_by_one_or_without_a_core_to_spare_everything_is_done_where_it_is_asked_for(run_all, monkeypatch):
    if run_all is side_by_side:
        monkeypatch.setattr(machine, "num_cores", torch.get_num_threads)
    here = (os.getpid(), threading.get_ident())

    def branch():
        now = later(threading.get_ident)
        assert now.done()
        return aside(os.getpid), now.result(), in_turn(threading.get_ident), is_stopped()

    expected = [(*here, here[1], False)]
    assert run_all([branch]) == expected


def test_the_first_error_is_raised_and_stops_the_other_branches():
    stopped: list[str] = []

    def fails():
        raise ValueError("no scale")

    def goes_on():
        try:
            for _ in range(1000):
                in_turn(lambda: time.sleep(0.01))
        except StoppedError:
            stopped.append("computing")
            assert is_stopped()
            raise

    def waits_for_the_helper():
        try:
            aside(time.sleep, 60)
        except StoppedError:
            stopped.append("aside")
            with pytest.raises(StoppedError):
                aside(os.getpid)
            raise

    before = time.monotonic()
    with pytest.raises(ValueError, match="no scale"):
        side_by_side([goes_on, waits_for_the_helper, fails])
    assert sorted(stopped) == ["aside", "computing"]
    # What would ask the helper only now starts no other one.
    assert sut.helper()._process is None
    assert time.monotonic() - before < 30


def test_an_error_of_what_was_left_for_later_is_raised_before_its_branch_asks():
    def fails():
        raise ValueError("no scale")

    def branch():
        later(fails)
        for _ in range(1000):
            in_turn(lambda: time.sleep(0.01))
        pytest.fail("the branch went on to its end")

    with pytest.raises(ValueError, match="no scale"):
        side_by_side([branch])


def test_an_error_while_computing_is_the_branchs():
    def fails():
        raise ValueError("no scale")

    def branch():
        with pytest.raises(ValueError, match="no scale"):
            in_turn(fails)
        return "went on"

    assert side_by_side([branch]) == ["went on"]


@pytest.mark.usefixtures("ctrl_c_works")
def test_ctrl_c_ends_a_stage_that_computes_and_every_branch():
    reached = []

    def computes():
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        time.sleep(60)

    def branch():
        try:
            in_turn(computes)
        except KeyboardInterrupt:
            reached.append("branch")
            raise

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        side_by_side([branch])
    assert reached == ["branch"]
    assert time.monotonic() - before < 30


def test_the_helper_of_a_process_is_one():
    assert sut.helper() is sut.helper()
