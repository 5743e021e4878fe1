"""`quantflow dashboard`: Prefect's server and web interface, the deployments and a worker, on one machine.

home/prefect/prefect.db       Prefect's database: what ran when; it holds no results
home/prefect/dashboard.json   address of the dashboard, for `quantflow run`
home/prefect/*.log            output of server, worker and deployment
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

import flows
from flows.hosting import dashboard_lock, processes
from flows.hosting.database import check_database
from flows.hosting.server import free_port, is_healthy, set_defaults, wait_until_healthy
from quantlib.errors import MachineError
from quantlib.files import lockable, read_file, write_atomically
from quantlib.recipe.schema import Recipe

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from flows.hosting.reconciler import Reconciler

POOL = "quantflow"
_LOOK_SECONDS = 5.0
# Longer than they were ever delayed on a machine busy on every core; the worker sends a heartbeat every 30 s.
_SERVER_SILENT_SECONDS = 60.0
_WORKER_SILENT_SECONDS = 180.0
_DEPLOY_SECONDS = 300.0
_ANSWER_SECONDS = 20.0
_STOP_SECONDS = 10.0


def serve(home: Path, port: int, num_runs: int, say: Callable[[str], None]) -> None:
    """Run the dashboard until SIGINT or SIGTERM, then stop everything that it started.

    Args:
        home: quantflow's home folder.
        port: Port of the web interface on loopback; 0: any free one.
        num_runs: Maximum number of concurrent runs.
        say: Called with messages for the user.

    Raises:
        MachineError: If the port is taken, another dashboard or a run with its own server already uses this home,
            the database is damaged, or a process does not start.
    """
    home = home.resolve()
    folder = home / "prefect"
    with dashboard_lock.claim(home), _alone(folder), _stop_signals() as stopped:
        port = _check_port(port)
        check_database(folder / "prefect.db")
        _configure(home, port)
        processes.adopt_orphans()
        environment = dict(os.environ)
        command = [sys.executable, "-m", "flows.hosting.server", str(port)]
        server = processes.Child("server", command, environment, folder / "server.log")
        try:
            _serve(home, port, num_runs, server, stopped, say)
        finally:
            server.stop(_STOP_SECONDS)
    say("Stopped. Start it again with the same command: the history is kept.")


def _serve(
    home: Path,
    port: int,
    num_runs: int,
    server: processes.Child,
    stopped: threading.Event,
    say: Callable[[str], None],
) -> None:
    folder = home / "prefect"
    url = os.environ["PREFECT_API_URL"]
    # Imported while the server starts.
    with processes.gc_paused():
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        from flows.hosting.reconciler import Reconciler

    wait_until_healthy(server, url)
    dashboard_lock.announce(home, url)
    say(f"Dashboard: http://127.0.0.1:{port}")
    with get_client(sync_client=True) as client:
        Reconciler(client, home, POOL).mark_dead(patience=0)
        _make_pool(client)
    command = [sys.executable, "-m", "flows.hosting.worker", "--pool", POOL, "--limit", str(num_runs)]
    worker = processes.Child("worker", command, dict(os.environ), folder / "worker.log")
    # A server that hangs must not block the code that is there to notice it.
    impatience = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _ANSWER_SECONDS}
    with temporary_settings(impatience), get_client(sync_client=True) as client:
        reconciler = Reconciler(client, home, POOL)
        try:
            # While the worker starts.
            if _deploy(home, stopped):
                say("Deployments are scheduled, and the worker is waiting for runs. Stop with Ctrl-C.")
            watched = [
                (server, processes.Pulse(lambda: is_healthy(url), _SERVER_SILENT_SECONDS)),
                (worker, processes.Pulse(_heartbeats(client), _WORKER_SILENT_SECONDS)),
            ]
            _watch(watched, reconciler, stopped, say)
        finally:
            _stop_worker(worker, server, reconciler)


def _watch(
    watched: list[tuple[processes.Child, processes.Pulse]],
    reconciler: "Reconciler",
    stopped: threading.Event,
    say: Callable[[str], None],
) -> None:
    import httpx

    errors = {child.name: processes.RepeatedErrors(child.log) for child, _ in watched}
    while not stopped.wait(_LOOK_SECONDS):
        for child, pulse in watched:
            for line in errors[child.name].news():
                say(f"The {child.name} repeats an error, and runs may not start: {line[:500]} (its log is {child.log})")
            if child.watch():
                pulse.reset()
                say(f"The {child.name} exited and was restarted; its log is {child.log}")
            elif pulse.is_silent():
                say(f"The {child.name} does not respond and is being restarted.")
                child.process.kill()
        processes.reap_orphans(child.process.pid for child, _ in watched)
        # A server that is restarting or busy is asked again in a moment.
        with suppress(httpx.HTTPError):
            for run in reconciler.mark_dead():
                say(f"Run {run.name} ({run.id}) has died: Retry in the dashboard resumes it from its finished stages.")


def _heartbeats(client: "SyncPrefectClient") -> Callable[[], bool]:
    """A function that says whether any worker has sent a heartbeat since its last call."""
    import httpx

    newest = datetime.min.replace(tzinfo=UTC)

    def beats() -> bool:
        nonlocal newest
        with suppress(httpx.HTTPError):
            before = newest
            workers = client.read_workers_for_work_pool(POOL)
            newest = max([newest, *(worker.last_heartbeat_time for worker in workers if worker.last_heartbeat_time)])
            return newest > before
        return False

    return beats


def _stop_worker(worker: processes.Child, server: processes.Child, reconciler: "Reconciler") -> None:
    """Stop the runs first: they and the worker report how they ended while the server still listens."""
    own = {worker.process.pid, server.process.pid}
    processes.end_all(set(processes.descendants(os.getpid())) - own, _STOP_SECONDS)
    worker.stop(_STOP_SECONDS)
    processes.end_all(set(processes.descendants(os.getpid())) - own, _STOP_SECONDS)
    with suppress(Exception):  # What cannot be marked now is marked at the next start.
        reconciler.mark_dead(patience=0)


def _make_pool(client: "SyncPrefectClient") -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        from prefect.workers.process import ProcessWorker

        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))


def _deploy(home: Path, stopped: threading.Event) -> bool:
    """Create the deployments of prefect.yaml unless they exist: changes made in the dashboard stay.

    Returns:
        Whether they exist; False if the dashboard is stopped meanwhile, which ends everything that it started.
    """
    project, file = find_project(), find_deployments()
    done = home / "prefect" / "deployed.json"
    digest = digest_deployments()
    if _read_json(done) == {"digest": digest, "project": str(project)} and _are_deployed():
        return True
    log = home / "prefect" / "deploy.log"
    status = _run_deploy(file, log, stopped)
    if status is not None and status < 0:
        status = _run_deploy(file, log, stopped)  # Something killed it.
    if status is None:
        return False
    if status != 0:
        raise MachineError(f"Cannot create the deployments of {file}; the reason is in {log}.")
    write_atomically(done, json.dumps({"digest": digest, "project": str(project)}).encode())
    return True


def digest_deployments() -> str:
    """A hash, in hex, of everything that the deployments are made from, forms included."""
    # A form is made from the flow's docstring and the recipe's schema, wherever its fields are defined.
    files = [find_deployments(), *sorted((find_project() / "flows").rglob("*.py"))]
    schema = json.dumps(Recipe.model_json_schema(), sort_keys=True).encode()
    return hashlib.sha256(b"\0".join([*(path.read_bytes() for path in files), schema])).hexdigest()


def _are_deployed() -> bool:
    import httpx
    from prefect.client.orchestration import get_client

    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        return len(client.read_deployments()) >= 3
    return False


def _run_deploy(file: Path, log: Path, stopped: threading.Event) -> int | None:
    """The exit status of `prefect deploy`, below 0 if it was killed; None if the dashboard was stopped first."""
    # Prefect would fill in the variable here if it were set; it must stay, for the worker to fill in.
    environment = {name: value for name, value in os.environ.items() if name != "QUANTFLOW_PROJECT"}
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 (our own file)
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
            cwd=find_project(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + _DEPLOY_SECONDS
    while process.poll() is None:
        if stopped.wait(0.05):
            return None
        if time.monotonic() > deadline:
            process.kill()
    return process.returncode


def find_project() -> Path:
    """The folder that holds the packages: a checkout, or where quantflow is installed."""
    return Path(flows.__file__).parents[1]


def find_deployments() -> Path:
    """The prefect.yaml of a checkout, or the one that was installed with the flows."""
    checkout = find_project() / "prefect.yaml"
    return checkout if checkout.exists() else find_project() / "flows" / "prefect.yaml"


def _read_json(file: Path) -> object:
    try:
        return json.loads(read_file(file))
    except (OSError, ValueError):
        return None


def _configure(home: Path, port: int) -> None:
    """Configure the server, the worker, the runs, and Prefect in this process."""
    os.environ |= {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT__SERVER_FINAL": "1",
        # The newer interface loads files from the network.
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # Leases in memory would be lost with the server, and the slots that they stand for would stay taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_WORKER_QUERY_SECONDS": "5",
        # A machine that is training at the same time may need more than the default 10 s.
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "QUANTFLOW_HOME": str(home),
        "QUANTFLOW_PROJECT": str(find_project()),
        # A recipe's "package.module:function" may be in the user's current folder.
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())]),
    }
    set_defaults(home / "prefect", verbose=False)


def _check_port(port: int) -> int:
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        # As the server does: a port counts as free even if its last connections are still closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MachineError(
                f"Port {port} cannot be used: {error.strerror}. Choose another with --port, or any free one with "
                "--port 0."
            ) from None
    return port


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only server on the database."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lockable(folder / "server.lock"), is_singleton=False)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        raise MachineError(
            f"A run that was started before the dashboard uses {folder} with its own server. Wait until it has "
            "finished, then start the dashboard."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set while the block runs."""
    stopped = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
