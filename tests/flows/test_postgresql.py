"""A team's server: Prefect on PostgreSQL, and Prefect's own commands, as docs/operations.md says."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from dashboard_driver import PROJECT, Dashboard

INITDB = shutil.which("initdb") or next(iter(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
POSTGRES = INITDB and str(Path(INITDB).resolve().with_name("postgres"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INITDB is None, reason="needs PostgreSQL's server (Debian: postgresql)"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(command, log, **options):
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        yield started
    finally:
        started.terminate()
        started.wait(30)


@contextmanager
def postgresql(log):
    """A database server; its address for Prefect."""
    # PostgreSQL refuses to run as root.
    user = None if os.geteuid() else "nobody"
    with tempfile.TemporaryDirectory(prefix="quantflow-") as place:
        if user is not None:
            os.chown(place, pwd.getpwnam(user).pw_uid, -1)
        data, port = f"{place}/data", free_port()
        quiet = {"user": user, "cwd": place}
        subprocess.run(
            [INITDB, "-D", data, "-U", "prefect", "-A", "trust"], check=True, stdout=subprocess.DEVNULL, **quiet
        )
        command = [POSTGRES, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", place, "-c", "fsync=off"]
        with process(command, log, **quiet):
            _wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close())
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"


def test_server_worker_and_flow_run_on_postgresql(tmp_path):
    team = Dashboard(tmp_path)  # Not started: only its recipe and its calls are used.
    port = free_port()
    team.url = f"http://127.0.0.1:{port}"
    common = team.environment | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"{team.url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    with ExitStack() as stack:
        address = stack.enter_context(postgresql(tmp_path / "postgresql.log"))
        server = common | {"PREFECT_API_DATABASE_CONNECTION_URL": address}
        command = [*prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        stack.enter_context(process(command, tmp_path / "server.log", env=server))
        _wait(lambda: urllib.request.urlopen(f"{team.url}/api/health", timeout=5).close())
        for arguments in (["work-pool", "create", "quantflow", "--type", "process"], ["deploy", "--all"]):
            done = subprocess.run(
                [*prefect, *arguments], check=False, cwd=PROJECT, env=common, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
        worker = common | {"QUANTFLOW_PROJECT": str(PROJECT), "QUANTFLOW_HOME": str(team.home)}
        command = [*prefect, "worker", "start", "--pool", "quantflow", "--limit", "1"]
        stack.enter_context(process(command, tmp_path / "worker.log", env=worker, cwd=tmp_path))
        for state in ("Completed", "Cached"):
            run = team.begin("ptq")
            team.wait(run)
            team.wait_for_tasks(run, state, 8)
    assert not (tmp_path / "prefect" / "prefect.db").exists()


def _wait(check, seconds=120):
    """Wait until something answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):
            return check()
        time.sleep(0.3)
    raise AssertionError(f"no answer in {seconds} s")
