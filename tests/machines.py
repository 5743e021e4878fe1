"""A Dask cluster whose machines are processes: a scheduler, and workers, each of which can be killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dashboard_driver import PROJECT, find_processes, own_environment, until

from flows.hosting.server import free_port


class Cluster:
    """A scheduler and workers; stop it after use.

    Args:
        folder: Holds the homes, and what the processes print.
        host: The address that the scheduler listens on.
        shared: The environment of machines that share a store: each then has a home of its own. None: they have the
            driver's.
    """

    def __init__(self, folder: Path, host: str = "127.0.0.1", shared: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.shared = shared
        self.host, self.port = host, free_port()
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def engine(self) -> str:
        """What `--engine` takes."""
        return f"dask://{self.host}:{self.port}"

    def start_scheduler(self) -> None:
        address = ("--host", self.host, "--port", str(self.port))
        self.scheduler = self._start(
            "scheduler", (), "-m", "dask", "scheduler", *address, "--no-dashboard", "--dashboard-address", "127.0.0.1:0"
        )

    def start_worker(self, name: str, project: Path = PROJECT, before: Sequence[str] = (), **environment: str) -> None:
        """Start a worker, maybe with the code of another checkout, behind another command, or with other variables."""
        home = self.home if self.shared is None else self.folder / f"home of {name}"
        command = ("-m", "flows.cli.commands", "worker", self.engine, "--name", name, "--home", str(home))
        path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(project)]))
        environment |= self.shared or {}
        self.workers[name] = self._start(name, before, *command, PYTHONPATH=path, **environment)

    def wait(self, *names: str) -> None:
        """Wait until the scheduler knows these workers, and no others."""
        from distributed import Client

        with Client(f"tcp://{self.host}:{self.port}", timeout=120, set_as_default=False) as client:

            def known() -> set[str]:
                found = client.sync(client.scheduler.identity, n_workers=-1)
                return {worker["name"] for worker in found["workers"].values()}

            until(lambda: known() == set(names), 120, self.logs)

    def kill(self, name: str) -> None:
        """Kill a worker, as if its machine had lost power; what it started must end by itself."""
        process = self.workers.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def kill_scheduler(self) -> None:
        assert self.scheduler is not None
        self.scheduler.kill()
        self.scheduler.wait()

    def replace(self, victim: str) -> None:
        """Kill the scheduler or a worker, and start it again."""
        if victim == "scheduler":
            self.kill_scheduler()
            self.start_scheduler()
        else:
            self.kill(victim)
            self.start_worker(victim)

    def children(self) -> list[int]:
        """The processes that compute stages."""
        workers = [process.pid for process in self.workers.values()]
        return [pid for worker in workers for pid in find_processes(worker, "tasks.cluster.child")]

    def stop(self) -> None:
        for process in (*self.workers.values(), self.scheduler):
            if process is not None:
                process.kill()
                process.wait()

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))

    def _start(self, name: str, before: Sequence[str], *command: str, **environment: str) -> subprocess.Popen[bytes]:
        own = own_environment(OMP_NUM_THREADS="1") | environment
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*before, sys.executable, *command], cwd=self.folder, env=own, stdout=log, stderr=subprocess.STDOUT
            )
