"""A dashboard in its own process, and its API as the web interface uses it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]

TINY = """
name = "tiny"

[model]
arguments = { width_mult = 0.25, inverted_residual_setting = [[1, 16, 1, 1], [2, 24, 1, 2]] }
weights = "train"
training = { epochs = 1, batch_size = 64 }

[data]
format = "digits"
resize = 16
crop = 16

[evaluation]
num_held_out = 100
max_images = 100

[calibration]
batch_size = 16
num_batches = 2

[[ptq]]
name = "minmax"
qconfig = "default"

[[qat]]
name = "qat"
epochs = 1
batches_per_epoch = 2
batch_size = 16

[benchmark]
num_samples = 10

[gate]
max_top1_drop = 1.0
"""


def own_environment(without: tuple[str, ...] = (), **changes: str) -> dict[str, str]:
    """This process's environment for a command, without any Prefect or quantflow settings of the user.

    Args:
        without: Prefixes of more names to leave out.
        changes: Variables to add.
    """
    left_out = ("PREFECT_", "QUANTFLOW_", *without)
    found = {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | changes
    # The checkout under test; if it is installed, this changes nothing.
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [found.get("PYTHONPATH"), str(PROJECT)]))
    return found


class Dashboard:
    """Starts `quantflow dashboard` on a home; use `stop`, or `kill`, then `start` again.

    Args:
        folder: Holds the home, a recipe, and what the processes print.
        environment: Variables added to this process's.
    """

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(TINY)
        self.environment = own_environment(**(environment or {}))
        self.url = ""
        self.headers = {"Content-Type": "application/json"}
        self.process: subprocess.Popen[str] | None = None

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a `quantflow` command."""
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "flows.cli.commands", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start(self) -> None:
        self.process = self.command("dashboard", "--home", str(self.home), "--port", "0")
        assert self.process.stdout is not None
        told = []
        for line in self.process.stdout:
            told.append(line)
            if line.startswith("Dashboard: "):
                self.url = line.split()[1]
            if line.startswith("Deployments are scheduled"):
                return
        raise AssertionError("".join(told))

    def stop(self, number: int = signal.SIGTERM) -> list[int]:
        """Stop it as a person would; returns the processes that are left."""
        assert self.process is not None
        started = self.processes()
        self.process.send_signal(number)
        self.process.communicate(timeout=120)
        return [pid for pid in started if _runs(pid)]

    def kill(self) -> None:
        """Kill every process at once, as if the machine had lost power."""
        for pid in self.processes():
            _kill(pid)
        assert self.process is not None
        self.process.communicate(timeout=30)

    def processes(self) -> list[int]:
        """The dashboard's process, and all that it started."""
        assert self.process is not None
        return find_processes(self.process.pid)

    def signal(self, part: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the process whose command line contains `part`; returns its pid."""
        assert self.process is not None
        found = next(iter(find_processes(self.process.pid, part)))
        os.kill(found, number)
        return found

    def kill_flow(self, run: str) -> None:
        _kill(int(self.run(run)["infrastructure_pid"]))

    def call(self, path: str, body: object = None, method: str = "POST") -> Any:
        content = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self.url}/api{path}", content, self.headers, method=method)
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                # The database is busy: Prefect's own clients retry, too.
                if error.code != 503:
                    raise AssertionError(f"{path}: {error.code} {error.read().decode()[:500]}") from None
            except (urllib.error.URLError, ConnectionError):
                pass  # The server is being restarted.
            time.sleep(1)
        raise AssertionError(f"{path}: busy all the time")

    def deployments(self) -> dict[str, dict[str, Any]]:
        """Deployments by flow."""
        return {found["entrypoint"].partition(":")[2]: found for found in self.call("/deployments/filter")}

    def begin(self, flow: str = "quantize", *changes: str) -> str:
        """Start a run of the tiny recipe, as "Quick run" does; returns its id."""
        parameters = {"recipe": str(self.recipe), "changes": list(changes)}
        body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return self.call(f"/deployments/{self.deployments()[flow]['id']}/create_flow_run", body)["id"]

    def retry(self, run: str) -> None:
        """Retry a run, as the button does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the dashboard"}
        answer = self.call(f"/flow_runs/{run}/set_state", {"state": state})
        assert answer["status"] == "ACCEPT", answer

    def run(self, run: str) -> dict[str, Any]:
        return self.call(f"/flow_runs/{run}", method="GET")

    def runs(self, **filters: Any) -> list[dict[str, Any]]:
        return self.call("/flow_runs/filter", {"flow_runs": filters})

    def state(self, run: str) -> str:
        return self.run(run)["state"]["name"]

    def wait(self, run: str, states: Collection[str] = ("Completed",), seconds: float = 400) -> str:
        """Wait until a run is in one of these states."""
        ends = {"Completed", "Failed", "Crashed", "Cancelled", *states}
        until(lambda: self.state(run) in ends, seconds, lambda: f"{self.run(run)['state']} {self.tasks(run)}")
        state = self.run(run)["state"]
        assert state["name"] in states, state
        return state["name"]

    def tasks(self, run: str) -> Counter[str]:
        """How many of a run's tasks are in each state, without the report's task."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "limit": 200}
        found = [task for task in self.call("/task_runs/filter", body) if task["state"]]
        return Counter(task["state"]["name"] for task in found if not task["name"].startswith("write_report"))

    def wait_for_tasks(self, run: str, state: str, count: int, seconds: float = 300) -> None:
        """Wait until `count` tasks are in a state; their states arrive a moment after the run's."""
        until(lambda: self.tasks(run)[state] >= count, seconds, lambda: f"{self.tasks(run)}")


def until(done: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.3)


def find_processes(pid: int, part: str = "") -> list[int]:
    """A process and its descendants, if their command lines contain `part`."""
    found, unseen = [pid], [pid]
    children = _children()
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return [each for each in found if part in _command_line(each)]


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        pid, parent = map(int, line.split())
        found.setdefault(parent, []).append(pid)
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
