"""Whatever dies, a run can soon be retried from the dashboard, and resumes from its finished stages."""

import signal
import time

import pytest
from dashboard_driver import Dashboard, until

pytestmark = pytest.mark.slow
# The deadline; `pytest -s` prints how long it actually took.
SECONDS = 120


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    found = Dashboard(tmp_path_factory.mktemp("dashboard"))
    found.start()
    yield found
    found.stop()


def flow(dashboard, run):
    dashboard.kill_flow(run)


def worker_and_flow(dashboard, run):
    dashboard.signal("flows.hosting.worker")
    dashboard.kill_flow(run)


def everything(dashboard, run):
    dashboard.kill()
    dashboard.start()


def an_orderly_stop(dashboard, run):
    assert dashboard.stop(signal.SIGINT) == []
    dashboard.start()


FAULTS = [flow, worker_and_flow, everything, an_orderly_stop]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_that_died_can_be_retried_and_repeats_no_finished_stage(dashboard, fault):
    before = num_records(dashboard)
    # A seed of its own makes nearly every stage of this run new.
    run = dashboard.begin("quantize", "qat.0.epochs=6", f"seed={1000 + FAULTS.index(fault)}")
    dashboard.wait_for_tasks(run, "Completed", 12)
    died = time.monotonic()
    fault(dashboard, run)
    dashboard.wait(run, {"Crashed"}, SECONDS)
    seconds = time.monotonic() - died
    assert seconds < SECONDS
    print(f"\n{fault.__name__}: retry possible after {seconds:.1f} s")
    # Retried immediately: a second report of the death must not undo this.
    dashboard.retry(run)
    dashboard.wait(run)
    dashboard.wait_for_tasks(run, "Cached", 12)
    # Over both attempts, each stage completes once.
    assert dashboard.tasks(run)["Completed"] <= num_records(dashboard) - before
    # What the dead attempt was working on does not stay Running forever.
    until(lambda: dashboard.tasks(run)["Running"] == 0, SECONDS, lambda: str(dashboard.tasks(run)))


def num_records(dashboard):
    return len(list((dashboard.home / "store" / "records").glob("*.json")))


def test_a_run_outlives_its_worker(dashboard):
    run = dashboard.begin("quantize", "qat.0.epochs=6", "seed=77")
    dashboard.wait_for_tasks(run, "Completed", 8)
    dashboard.signal("flows.hosting.worker")
    dashboard.wait(run)
    assert dashboard.run(run)["run_count"] == 1
    # The worker is back.
    dashboard.wait(dashboard.begin("ptq"))


@pytest.mark.parametrize("part", ["flows.hosting.server", "flows.hosting.worker"])
def test_a_part_that_hangs_is_restarted(dashboard, part):
    pid = dashboard.signal(part, signal.SIGSTOP)
    # Covers how long `quantflow dashboard` waits for a sign of life, plus the restart.
    until(lambda: pid not in dashboard.processes(), 300, lambda: f"{part} still hangs")
    dashboard.wait(dashboard.begin("ptq"))


def test_deployments_are_made_even_if_the_process_that_makes_them_is_killed(tmp_path):
    found = Dashboard(tmp_path)
    found.process = found.command("dashboard", "--home", str(found.home), "--port", "0")

    def is_killed():
        try:
            return bool(found.signal("prefect --no-prompt deploy"))
        except StopIteration:
            return False

    until(is_killed, SECONDS, lambda: "nothing makes deployments")
    assert found.process.stdout is not None
    told = iter(found.process.stdout.readline, "")
    assert any(line.startswith("Deployments are scheduled") for line in told)
    assert found.stop() == []


def test_what_a_killed_dashboard_left_in_tmpdir_is_removed_by_the_next_run(tmp_path):
    (tmp_path / "tmp").mkdir()
    found = Dashboard(tmp_path, {"TMPDIR": str(tmp_path / "tmp")})
    found.start()
    found.begin("quantize", "qat.0.epochs=50")
    records = found.home / "store" / "records"
    until(lambda: len(list(records.glob("*.json"))) > 6, SECONDS, lambda: "no stage is done")
    found.kill()
    # This file holds the environment that the run was given.
    assert list((tmp_path / "tmp").rglob("workspace.json")) != []
    found.start()
    found.wait(found.begin("ptq"))
    assert found.stop() == []
    # torch keeps a folder there for the next process.
    assert [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")] == []
