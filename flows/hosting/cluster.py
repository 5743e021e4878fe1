"""What computes a flow's stages: this process, a cluster on this machine, or one elsewhere; and a cluster's worker."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.hosting.processes import Child
from quantlib import temporary
from quantlib.errors import MachineError, RecipeError, reason_of

if TYPE_CHECKING:
    from tasks.execution import Executor

LOCAL = "local"
ENGINE = r"^(local|dask|dask(\+tls)?://[A-Za-z0-9.:\[\]_-]+(\?benchmark=[A-Za-z0-9._-]+)?)$"
"""What may be given as the engine."""
_CONNECT_SECONDS = 30
_STOP_SECONDS = 10
_WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class Address:
    """A scheduler, as `--engine` names it."""

    scheduler: str | None
    """tcp://HOST:PORT or tls://HOST:PORT; None: a cluster on this machine."""
    timed_on: str | None
    """The worker that times files; None: the first by name."""


def parse_engine(engine: str) -> Address | None:
    """The cluster that an engine stands for; None: this process.

    Raises:
        RecipeError: If it is none of the allowed forms.
    """
    if re.fullmatch(ENGINE, engine) is None:
        raise RecipeError(
            f"--engine {engine!r} is not known. Allowed: local (this process), dask (a cluster on this machine), "
            "dask://HOST:PORT (that of a scheduler), dask://HOST:PORT?benchmark=WORKER (and the worker that times)."
        )
    if engine == LOCAL:
        return None
    place, _, timed_on = engine.partition("?benchmark=")
    scheme, _, host = place.partition("://")
    protocol = "tls" if scheme.endswith("tls") else "tcp"
    return Address(f"{protocol}://{host}" if host else None, timed_on or None)


@contextmanager
def open_executor(engine: str, home: Path, say: Callable[[str], None]) -> Iterator[Executor]:
    """What computes the stages of a flow.

    Args:
        engine: As `--engine` takes it.
        home: The home folder.
        say: Called with messages for the user that are not errors.

    Raises:
        RecipeError: If there is no such engine.
        MachineError: If Dask is not installed, or the scheduler does not answer.
    """
    address = parse_engine(engine)
    if address is None:
        from tasks.execution import LocalExecutor

        yield LocalExecutor()
        return
    require_dask()
    with nullcontext(address.scheduler) if address.scheduler else _local_cluster(home) as scheduler:
        from distributed import Client

        from quantlib.store.opening import open_store
        from tasks.cluster.executor import DaskExecutor
        from tasks.cluster.machines import Machines

        try:
            client = Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
        except OSError as error:
            raise MachineError(
                f"No Dask scheduler answers at {scheduler}: {reason_of(error)}. Start one with `dask scheduler`, and "
                "workers with `quantflow worker`."
            ) from None
        executor = DaskExecutor(client, open_store(home), Machines(address.timed_on), say)
        try:
            yield executor
        finally:
            executor.close()


def require_dask() -> None:
    """Raise an error if Dask is not installed; otherwise set it up for this process.

    Raises:
        MachineError: If it is not installed.
    """
    if importlib.util.find_spec("distributed") is None:
        raise MachineError("--engine dask needs Dask, which is not installed: pip install 'quantflow[dask]'.")
    import dask

    # It would log each worker that comes and goes, and each one that is killed.
    dask.config.set({"distributed.logging.distributed": "critical", "distributed.logging.bokeh": "critical"})


@contextmanager
def _local_cluster(home: Path) -> Iterator[str]:
    """A scheduler in this process, and a worker on this machine with a slot per core; nobody else can reach them."""
    from distributed import LocalCluster

    num_cores = len(os.sched_getaffinity(0))
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    # No dashboard; but Dask's port for its own health checks cannot be turned off.
    own = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=0, host="127.0.0.1", scheduler_kwargs=own, silence_logs=False) as cluster:
        address = cluster.scheduler_address
        command = [sys.executable, "-m", "flows.hosting.cluster", address, str(home), str(max(1, num_cores // threads))]
        log = home / "dask" / "worker.log"
        worker = Child("worker", command, {**os.environ, "OMP_NUM_THREADS": str(threads)}, log)
        stopped = threading.Event()
        keeper = threading.Thread(target=_keep, args=(worker, stopped), daemon=True)
        keeper.start()
        try:
            yield address
        finally:
            stopped.set()
            keeper.join()
            worker.stop(_STOP_SECONDS)


def _keep(worker: Child, stopped: threading.Event) -> None:
    """Restart a worker that dies; one that keeps dying is given up, and the run says that there is none."""
    with suppress(MachineError):
        while not stopped.wait(_WATCH_SECONDS):
            worker.watch()


def serve_worker(
    scheduler: str, home: Path, name: str | None, num_slots: int, host: str | None, say: Callable[[str], None] = print
) -> None:
    """Be a worker until the process is stopped; connect again if the scheduler is restarted.

    Args:
        scheduler: tcp://HOST:PORT or tls://HOST:PORT.
        home: The home folder, which it shares with the machines that run flows.
        name: Its name in messages; None: the machine's.
        num_slots: How many stages it computes at once; each uses an equal share of the cores.
        host: The address that it listens on; None: the one by which this machine reaches the scheduler.
        say: Called with messages for the user.

    Raises:
        MachineError: If the scheduler does not let it join.
    """
    require_dask()
    import asyncio

    from distributed import Worker
    from distributed.utils import get_ip

    os.environ["QUANTFLOW_HOME"] = str(home.resolve())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_slots)))
    peer, _, port = scheduler.partition("://")[2].rpartition(":")

    async def serve() -> None:
        with temporary.new_folder() as folder:
            worker = Worker(
                scheduler,
                nthreads=num_slots,
                name=name or socket.gethostname(),
                host=host or get_ip(peer, int(port)),
                local_directory=str(folder),
                # Stages compute in processes of their own.
                memory_limit=0,
                dashboard=False,
            )
            await worker
            say(f"{worker.name} computes {num_slots} stages at once for {scheduler}, with the home {home.resolve()}.")
            await worker.finished()
            say(f"The scheduler at {scheduler} is gone; waiting for it.")

    while True:
        try:
            asyncio.run(serve())
        except (OSError, ValueError) as error:
            raise MachineError(
                f"The worker cannot join {scheduler}: {reason_of(error)} Give it a --name of its own if another has it."
            ) from None


if __name__ == "__main__":
    from flows.hosting.processes import end_with_parent

    end_with_parent()
    serve_worker(sys.argv[1], Path(sys.argv[2]), None, int(sys.argv[3]), "127.0.0.1")
