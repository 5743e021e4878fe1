import uuid

import prefect.artifacts
import pytest

from tasks.listener import NullListener
from tasks.tracking import ProgressArtifacts, artifact_key


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def told(monkeypatch):
    """Calls to the server: ("new", label, percent) and ("update", percent)."""
    calls: list[tuple] = []

    def create(percent, description):
        calls.append(("new", description, percent))
        return uuid.uuid4()

    monkeypatch.setattr(prefect.artifacts, "create_progress_artifact", create)
    monkeypatch.setattr(
        prefect.artifacts, "update_progress_artifact", lambda _, percent: calls.append(("update", percent))
    )
    return calls


def test_a_short_stage_makes_no_artifact(told):
    clock = Clock()
    progress = ProgressArtifacts(NullListener(), clock)
    progress.stage_started("calibrate")
    for done in range(1, 101):
        clock.now += 0.01
        progress.stage_progressed("calibrate", done, 100)
    progress.stage_finished("calibrate", cached=False, seconds=1.0)
    assert told == []


def test_a_long_stage_is_reported_every_few_seconds_and_at_its_end(told):
    clock = Clock()
    progress = ProgressArtifacts(NullListener(), clock)
    progress.stage_started("calibrate")
    for done in range(1, 101):
        clock.now += 0.12
        progress.stage_progressed("calibrate", done, 100)
    progress.stage_finished("calibrate", cached=False, seconds=12.0)
    assert told == [("new", "calibrate", 42.0), ("update", 84.0), ("update", 100.0)]


def test_the_next_stage_has_an_artifact_of_its_own(told):
    clock = Clock()
    progress = ProgressArtifacts(NullListener(), clock)
    for label in ("calibrate", "evaluate"):
        progress.stage_started(label)
        clock.now += 60
        progress.stage_progressed(label, 1, 2)
        progress.stage_finished(label, cached=False, seconds=60.0)
    assert [call[1] for call in told if call[0] == "new"] == ["calibrate", "evaluate"]


def test_a_server_that_refuses_does_not_stop_the_run(monkeypatch):
    asked = []

    def refuse(*_, **__):
        asked.append("new")
        raise ConnectionError("no server")

    monkeypatch.setattr(prefect.artifacts, "create_progress_artifact", refuse)
    clock = Clock()
    progress = ProgressArtifacts(NullListener(), clock)
    progress.stage_started("calibrate")
    clock.now = 60
    progress.stage_progressed("calibrate", 1, 2)
    progress.stage_finished("calibrate", cached=False, seconds=60.0)
    assert asked == ["new"]


def test_a_server_that_is_gone_is_not_asked_at_each_step_of_a_stage(monkeypatch):
    asked: list[float] = []
    clock = Clock()

    def wait_in_vain(*_, **__):
        asked.append(clock.now)
        clock.now += 14
        raise ConnectionError("no server")

    monkeypatch.setattr(prefect.artifacts, "create_progress_artifact", wait_in_vain)
    progress = ProgressArtifacts(NullListener(), clock)
    progress.stage_started("calibrate")
    for done in range(300):
        clock.now += 1
        progress.stage_progressed("calibrate", done, 300)
    assert len(asked) == 3, asked


def test_the_key_of_a_recipes_results_is_one_that_prefect_allows():
    assert artifact_key("My_Recipe.v2") == "quantflow-my-recipe-v2"
