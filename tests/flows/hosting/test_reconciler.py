"""Runs whose process is gone, with a fake server: which are marked as crashed, and when."""

import os
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from uuid import uuid4

import harness
import pytest
from prefect.client.schemas.objects import StateType

from flows.hosting import reconciler
from quantlib.recipe.schema import parse_recipe
from quantlib.store.journal import Journal


class Server:
    """Knows one unfinished run, and records the states reported for it."""

    def __init__(self, **run):
        state = SimpleNamespace(type=StateType.RUNNING, timestamp=datetime.now(UTC) - timedelta(seconds=60))
        defaults = {"id": uuid4(), "state": state, "work_pool_name": "quantflow", "infrastructure_pid": None}
        self.run = SimpleNamespace(**defaults | run)
        self.told = []

    def read_flow_runs(self, **_):
        return [self.run]

    def read_task_runs(self, **_):
        return []

    def set_flow_run_state(self, run, state, *, force):
        assert force
        self.told.append((run, state.type))


@pytest.fixture
def later(monkeypatch):
    """Moves the reconciler's clock."""
    passed = [0.0]

    def move(seconds):
        passed[0] += seconds

    real = time.monotonic
    monkeypatch.setattr(reconciler.time, "monotonic", lambda: real() + passed[0])
    return move


def attempt(home, run, recipe="tiny"):
    """The journal of one attempt at a run, as its process writes it."""
    return Journal(home / "runs" / f"20260501-030000-{recipe}-{str(run)[:8]}").record(
        "quantize", parse_recipe(harness.RECIPE), str(run)
    )


def die(home, run):
    """Leave what a killed attempt leaves: no outcome."""
    with attempt(home, run):
        pass
    next((home / "runs").glob("*/outcome.json")).unlink()


def test_a_run_that_died_a_moment_ago_is_left_to_its_worker_then_marked(tmp_path, later):
    server = Server()
    die(tmp_path, server.run.id)
    looks = reconciler.Reconciler(server, tmp_path, "quantflow")
    assert looks.mark_dead() == []
    later(9)
    assert looks.mark_dead() == []
    later(2)
    assert looks.mark_dead() == [server.run]
    assert server.told == [(server.run.id, StateType.CRASHED)]


def test_at_the_start_there_is_no_worker_to_wait_for(tmp_path):
    server = Server()
    die(tmp_path, server.run.id)
    assert reconciler.Reconciler(server, tmp_path, "quantflow").mark_dead(patience=0) == [server.run]


def test_a_run_whose_process_lives_is_never_marked(tmp_path, later):
    server = Server()
    looks = reconciler.Reconciler(server, tmp_path, "quantflow")
    with attempt(tmp_path, server.run.id):
        for _ in range(3):
            assert looks.mark_dead() == []
            later(3600)
        assert looks.mark_dead(patience=0) == []


def test_a_run_of_several_recipes_lives_as_long_as_one_of_them_runs(tmp_path, later):
    server = Server()
    looks = reconciler.Reconciler(server, tmp_path, "quantflow")
    for recipe in ("first", "third"):
        with attempt(tmp_path, server.run.id, recipe):
            pass
    with attempt(tmp_path, server.run.id, "second"):
        later(3600)
        assert looks.mark_dead() == []
    later(3600)
    assert looks.mark_dead() == [server.run]


def test_a_run_that_is_being_started_has_no_process_yet(tmp_path, later):
    server = Server()
    looks = reconciler.Reconciler(server, tmp_path, "quantflow")
    assert looks.mark_dead() == []
    later(40)
    assert looks.mark_dead() == []
    later(10)
    assert looks.mark_dead() == [server.run]


def test_a_run_without_a_journal_lives_as_long_as_its_process(tmp_path, later):
    server = Server(infrastructure_pid=os.getpid())
    looks = reconciler.Reconciler(server, tmp_path, "quantflow")
    looks.mark_dead()
    later(3600)
    assert looks.mark_dead() == []


def test_runs_of_other_pools_are_not_judged(tmp_path, later):
    looks = reconciler.Reconciler(Server(work_pool_name="elsewhere"), tmp_path, "quantflow")
    looks.mark_dead()
    later(3600)
    assert looks.mark_dead() == []


def test_a_dead_run_that_was_being_cancelled_is_cancelled(tmp_path):
    server = Server()
    server.run.state.type = StateType.CANCELLING
    die(tmp_path, server.run.id)
    reconciler.Reconciler(server, tmp_path, "quantflow").mark_dead(patience=0)
    assert server.told == [(server.run.id, StateType.CANCELLED)]
