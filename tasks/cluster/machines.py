"""Which machines there are, what each has, and which one a stage gets: slots are counted here, in the driver.

Dask itself would queue a short stage behind a long one although another machine is free, and give nothing to a worker
that joins late. So it only ever gets a stage for a worker with a free slot.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from quantlib.errors import MachineError
from quantlib.runtimes.available import Machine
from tasks.cluster.needs import Needs

PATIENCE_SECONDS = 30.0
"""How long to wait for a machine that has what a stage needs: a worker that was restarted is back by then."""


@dataclass(eq=False)
class Worker:
    """A Dask worker that has said what it is."""

    address: str
    name: str
    num_slots: int
    """How many stages it computes at once."""
    machine: Machine
    paths: dict[str, bool] = field(default_factory=dict)
    """Whether a path exists there, for those that were asked about."""
    num_running: int = 0
    fault: str = ""
    """Why it gets no stage; "" if it does."""
    is_gone: bool = False


@dataclass(eq=False)
class _Ticket:
    """A stage that waits for a worker."""

    what: str
    needs: Needs
    alone: bool
    worker: Worker | None = None


class Machines:
    """The workers of a cluster.

    Args:
        timed_on: The name of the worker that times files; None: the first by name.
        patience: Seconds to wait for a worker that has what a stage needs.
    """

    def __init__(self, timed_on: str | None = None, patience: float = PATIENCE_SECONDS) -> None:
        self._timed_on = timed_on
        self._patience = patience
        self._workers: dict[str, Worker] = {}
        self._tickets: list[_Ticket] = []
        self._changed = threading.Condition()
        self._end: BaseException | None = None
        self._last_left = -math.inf
        self._connected: set[str] = set()

    def join(self, worker: Worker) -> None:
        """Add a worker."""
        with self._changed:
            self._workers[worker.address] = worker
            self._assign()

    def keep(self, addresses: Mapping[str, object]) -> None:
        """Remove all workers but those at these addresses; those that have not joined yet are waited for."""
        with self._changed:
            self._connected = set(addresses)
            for address in self._workers.keys() - addresses.keys():
                self._workers.pop(address).is_gone = True
                self._last_left = time.monotonic()
            self._assign()

    def learn(self, worker: Worker, paths: Mapping[str, bool]) -> None:
        """Note which paths exist on a worker."""
        with self._changed:
            worker.paths.update(paths)
            self._assign()

    def unknown(self) -> list[tuple[Worker, list[str]]]:
        """The paths that stages wait for, and on which workers it is not known whether they exist."""
        with self._changed:
            wanted = {path for ticket in self._tickets for path in ticket.needs.paths}
            asked = [worker for worker in self._workers.values() if not worker.fault]
            found = [(worker, sorted(wanted - worker.paths.keys())) for worker in asked]
        return [(worker, paths) for worker, paths in found if paths]

    def set_aside(self, worker: Worker, fault: str) -> None:
        """Give a worker no more stages."""
        with self._changed:
            worker.fault = fault
            self._assign()

    def stop(self, error: BaseException) -> None:
        """Raise an error in everything that waits, from now on."""
        with self._changed:
            self._end = self._end or error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the error that `stop` was given, if it was called."""
        if self._end is not None:
            raise self._end

    def timing_worker(self) -> Worker:
        """The worker that times files: what the machine has decides about the stages.

        Raises:
            MachineError: If there is none, or none with the name that was asked for.
        """
        deadline = time.monotonic() + self._patience
        with self._changed:
            while True:
                self.check()
                found = self._timing_worker()
                # Once all have said what they are, the choice does not depend on who was first.
                if found is not None and self._connected <= self._workers.keys():
                    return found
                if time.monotonic() > deadline:
                    raise MachineError(self._explain_absence())
                self._changed.wait(0.1)

    @contextmanager
    def slot(self, what: str, needs: Needs, *, alone: bool) -> Iterator[Worker]:
        """Hold a slot of a worker that has what a stage needs.

        Args:
            what: The stage's label, for messages.
            needs: What the worker must have.
            alone: The worker is the one that times files, and nothing else may run on its machine.

        Raises:
            MachineError: If no worker has it for as long as patience lasts.
        """
        ticket = _Ticket(what, needs, alone)
        worker = self._wait(ticket)
        try:
            yield worker
        finally:
            with self._changed:
                worker.num_running -= worker.num_slots if alone else 1
                self._assign()

    def _wait(self, ticket: _Ticket) -> Worker:
        deadline = None
        with self._changed:
            self._tickets.append(ticket)
            try:
                self._assign()
                while ticket.worker is None:
                    self.check()
                    obstacles = [self._obstacle(worker, ticket) for worker in self._workers.values()]
                    if "" in obstacles or None in obstacles:
                        deadline = None
                    else:
                        deadline = deadline or time.monotonic() + self._patience
                        self._give_up(ticket, deadline)
                    self._changed.wait(0.5)
            except BaseException:
                if ticket.worker is not None:
                    ticket.worker.num_running -= ticket.worker.num_slots if ticket.alone else 1
                raise
            finally:
                if ticket in self._tickets:
                    self._tickets.remove(ticket)
            return ticket.worker

    def _give_up(self, ticket: _Ticket, deadline: float) -> None:
        """Raise an error if no worker that could compute a stage can still be expected."""
        one_is_back_soon = time.monotonic() < self._last_left + self._patience
        all_are_faulty = bool(self._workers) and all(worker.fault for worker in self._workers.values())
        if time.monotonic() > deadline or (all_are_faulty and not one_is_back_soon):
            raise MachineError(self._explain(ticket))

    def _assign(self) -> None:
        """Give workers with free slots to stages, those that wait longest first."""
        reserved: set[str] = set()
        for ticket in list(self._tickets):
            able = [w for w in self._workers.values() if self._obstacle(w, ticket) == ""]
            free = [
                worker
                for worker in able
                if worker.machine.name not in reserved
                and worker.num_running < worker.num_slots
                and not (ticket.alone and self._is_busy(worker.machine.name))
            ]
            if free:
                # The idlest first, so that stages spread.
                worker = min(free, key=lambda w: (w.num_running / w.num_slots, w.name, w.address))
                worker.num_running += worker.num_slots if ticket.alone else 1
                ticket.worker = worker
                self._tickets.remove(ticket)
            elif ticket.alone:
                # Later stages must not keep the machine busy for ever.
                reserved |= {worker.machine.name for worker in able}
        self._changed.notify_all()

    def _is_busy(self, machine: str) -> bool:
        return any(worker.num_running for worker in self._workers.values() if worker.machine.name == machine)

    def _timing_worker(self, needs: Needs | None = None) -> Worker | None:
        fit = [w for w in self._workers.values() if not w.fault and self._timed_on in {None, w.name}]
        # Another one may have joined since the run began.
        fit = [worker for worker in fit if needs is None or not needs.lacking(worker.machine)]
        return min(fit, key=lambda worker: (worker.name, worker.address), default=None)

    def _obstacle(self, worker: Worker, ticket: _Ticket) -> str | None:
        """Why a worker cannot compute a stage; "" if it can; None if that is not known yet."""
        if worker.fault:
            return worker.fault
        lacking = ticket.needs.lacking(worker.machine)
        if lacking:
            return f"it lacks {lacking}"
        if ticket.alone and worker is not self._timing_worker(ticket.needs):
            return "it is not the one that times files"
        missing = [path for path in ticket.needs.paths if not worker.paths.get(path, True)]
        if missing:
            return f"it lacks {missing[0]}"
        return None if ticket.needs.paths - worker.paths.keys() else ""

    def _explain(self, ticket: _Ticket) -> str:
        if not self._workers:
            return self._explain_absence()
        obstacles = [f"{w.name}: {self._obstacle(w, ticket)}" for w in self._workers.values()]
        return f"No worker can compute {ticket.what}. {'; '.join(obstacles)}."

    def _explain_absence(self) -> str:
        connected = ", ".join(f"{w.name} ({w.fault})" if w.fault else w.name for w in self._workers.values())
        wanted = "" if self._timed_on is None else f" named {self._timed_on!r}, which is to time files,"
        others = f"; these are: {connected}" if connected else ""
        return f"No worker{wanted} is connected{others}. Start one with `quantflow worker`."
