"""The dashboard as people use it, in its own processes: one for the whole file, since it takes seconds to start."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from dashboard_driver import PROJECT, Dashboard, until

from flows.hosting import dashboard_lock
from flows.hosting.processes import is_alive

CONNECTIONS = Path(__file__).parent / "watch_connections"
running = pytest.mark.slow


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    found = Dashboard(folder, {"PYTHONPATH": str(CONNECTIONS), "CONNECTIONS_FILE": str(folder / "connections")})
    found.start()
    yield found
    assert found.stop() == [], "processes outlived the dashboard"


def test_a_dashboard_is_found_while_it_runs_and_no_longer(tmp_path):
    assert dashboard_lock.find_dashboard(tmp_path) is None
    with dashboard_lock.claim(tmp_path):
        assert dashboard_lock.find_dashboard(tmp_path) is None
        dashboard_lock.announce(tmp_path, "http://127.0.0.1:1/api")
        assert dashboard_lock.find_dashboard(tmp_path) == "http://127.0.0.1:1/api"
    assert dashboard_lock.find_dashboard(tmp_path) is None


def test_the_file_of_a_dashboard_that_was_killed_is_not_believed(tmp_path):
    dashboard_lock.announce(tmp_path, "http://127.0.0.1:1/api")
    assert dashboard_lock.find_dashboard(tmp_path) is None


@running
def test_the_interface_is_served_and_every_flow_is_scheduled(dashboard):
    with urllib.request.urlopen(dashboard.url, timeout=60) as page:
        assert b"<html" in page.read()
    found = dashboard.deployments()
    assert set(found) == {"quantize", "ptq", "qat"}
    assert all(deployment["schedules"][0]["active"] for deployment in found.values())
    assert str(PROJECT) not in str([deployment["pull_steps"] for deployment in found.values()])


@running
def test_a_run_completes_and_the_next_one_reuses_every_stage(dashboard):
    first = dashboard.begin()
    dashboard.wait(first)
    second = dashboard.begin()
    dashboard.wait(second)
    num_stages = len(list((dashboard.home / "store" / "records").glob("*.json")))
    dashboard.wait_for_tasks(first, "Completed", num_stages)
    dashboard.wait_for_tasks(second, "Cached", num_stages)
    assert dashboard.run(second)["name"] == "tiny"


@running
def test_a_run_whose_stages_are_all_reused_has_its_result_as_an_artifact(dashboard):
    for _ in range(2):
        run = dashboard.begin()
        dashboard.wait(run)
    (artifact,) = dashboard.call("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    assert artifact["key"] == "quantflow-tiny"
    assert artifact["description"].startswith(("Ship ", "Nothing to ship"))  # What the list of artifacts shows.
    assert "| variant | runtime | images | top-1 |" in artifact["data"]
    assert "stages were reused." in artifact["data"]
    assert re.search(r"## Since `\d{8}-\d{6}-tiny-", artifact["data"])


@running
def test_a_schedule_starts_a_run_by_itself(dashboard):
    deployment = dashboard.deployments()["ptq"]["id"]
    parameters = {"recipe": str(dashboard.recipe), "changes": []}
    schedule = {"interval": 5, "anchor_date": datetime.now(UTC).isoformat(), "timezone": "UTC"}
    body = [{"schedule": schedule, "active": True, "parameters": parameters}]
    (added,) = dashboard.call(f"/deployments/{deployment}/schedules", body)
    try:
        dashboard.wait(_first_scheduled(dashboard, deployment))
    finally:
        dashboard.call(f"/deployments/{deployment}/schedules/{added['id']}", method="DELETE")


@running
def test_a_run_from_the_command_line_is_seen_on_the_dashboard(dashboard):
    command = dashboard.command("run", str(dashboard.recipe), "--home", str(dashboard.home), "--set", "name=by_hand")
    output, _ = command.communicate(timeout=400)
    assert command.returncode == 0, output
    (run,) = dashboard.runs(name={"any_": ["by_hand"]})
    assert run["state"]["name"] == "Completed"
    assert run["deployment_id"] is None


@running
def test_a_dashboard_is_stopped_while_it_still_makes_its_deployments(tmp_path):
    starting = Dashboard(tmp_path)
    starting.process = starting.command("dashboard", "--home", str(starting.home), "--port", "0")
    assert starting.process.stdout.readline().startswith("Dashboard: ")
    asked = time.monotonic()
    started = starting.processes()
    starting.process.send_signal(signal.SIGTERM)
    said = starting.process.communicate(timeout=120)[0]
    assert time.monotonic() - asked < 60
    assert "Deployments are scheduled" not in said
    assert "Stopped." in said
    assert not any(is_alive(pid) for pid in started)


@running
def test_a_second_dashboard_on_the_home_is_refused_with_the_firsts_address(dashboard):
    command = dashboard.command("dashboard", "--home", str(dashboard.home), "--port", "0")
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 2
    assert f"already running at {dashboard.url}" in output


@running
def test_a_port_that_is_taken_is_refused(dashboard, tmp_path):
    port = dashboard.url.rpartition(":")[2]
    command = dashboard.command("dashboard", "--home", str(tmp_path), "--port", port)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 2
    assert f"Port {port} cannot be used" in output
    assert "--port" in output


@running
def test_a_run_that_fails_sends_the_documented_notification(dashboard):
    documented = (PROJECT / "docs" / "operations.md").read_text()
    (program,) = re.findall(r"<<'PYTHON'\n(.*?)^PYTHON$", documented, re.DOTALL | re.MULTILINE)
    with receiver() as (url, told):
        set_up = program.replace("https://example.com/hook", url)
        environment = dashboard.environment | {"PREFECT_API_URL": f"{dashboard.url}/api"}
        subprocess.run([sys.executable, "-c", set_up], env=environment, check=True, timeout=120)
        run = dashboard.begin("ptq", "model.weights=missing.pth")
        dashboard.wait(run, {"Failed"})
        until(lambda: bool(told), 60, lambda: "nobody was notified")
    assert told == [{"text": "tiny is Failed"}]


@running
def test_no_process_tries_an_address_but_loopback(dashboard):
    dashboard.wait(dashboard.begin("qat"))
    lines = (dashboard.folder / "connections").read_text().splitlines()
    seen = [line.split("\t") for line in lines]
    for part in ("flows.hosting.server", "flows.hosting.worker", "prefect.engine", "flows.cli.commands"):
        assert any(part in command for *_, command in seen), f"{part} was not watched"
    assert foreign(lines) == []


@pytest.mark.parametrize("attempt", ["connect(('192.0.2.1', 9))", "sendto(b'', ('192.0.2.1', 9))"])
def test_the_watch_notices_another_address(attempt, tmp_path):
    file = tmp_path / "connections"
    # A datagram socket: it does not matter whether anything leaves this machine.
    program = f"import contextlib, socket\nwith contextlib.suppress(OSError): socket.socket(type=2).{attempt}"
    environment = {"PYTHONPATH": str(CONNECTIONS), "CONNECTIONS_FILE": str(file)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    (line,) = foreign(file.read_text().splitlines())
    assert line.startswith("192.0.2.1\tsocket.")


def foreign(lines):
    """Lines about addresses other than loopback."""
    return [line for line in lines if line.split("\t")[0] not in {"127.0.0.1", "::1", "localhost", "None", "started"}]


@contextmanager
def receiver():
    """A loopback address, and what is sent to it."""
    told = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", told
        server.shutdown()


def _first_scheduled(dashboard, deployment):
    """The first run of a deployment started by a schedule."""

    def started():
        found = dashboard.runs(deployment_id={"any_": [deployment]}, state={"type": {"not_any_": ["SCHEDULED"]}})
        return [run["id"] for run in found if run["auto_scheduled"]]

    until(lambda: bool(started()), 120, lambda: "the schedule started no run")
    return started()[-1]


@running
def test_runs_of_a_dashboard_use_the_store_that_machines_share(tmp_path):
    for place in ("shared", "machine"):
        (tmp_path / place).mkdir()
    found = Dashboard(tmp_path / "machine", {"QUANTFLOW_STORE": str(tmp_path / "shared")})
    found.start()
    try:
        run = found.begin()
        found.wait(run)
    finally:
        assert found.stop() == []
    assert len(list((tmp_path / "shared" / "records").iterdir())) > 10
    assert not (found.home / "store" / "records").exists()
