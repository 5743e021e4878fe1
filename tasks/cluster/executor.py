"""Computes stages on the workers of a Dask cluster. Everything about the run stays in this process, the driver.

Workers get a plain call by name with a string, and return a string; inputs and outputs go through the store.
"""

from __future__ import annotations

import functools
import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantlib import errors
from quantlib.errors import MachineError, QuantflowError, StoreError
from quantlib.recipe.schema import Recipe
from quantlib.runtimes.available import Machine, Runtime
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.cluster import worker as remote
from tasks.cluster.codec import encode
from tasks.cluster.machines import Machines, Worker
from tasks.cluster.needs import find_needs
from tasks.stage import Job, Stage

if TYPE_CHECKING:
    from distributed import Client

_LOOK_SECONDS = 0.5
# Getting an answer's few bytes from a worker that has them.
_FETCH_SECONDS = 30
# Workers report to the scheduler every second: one that has not for so long hangs. Dask itself waits five minutes.
_SILENT_SECONDS = 60.0
# A stage that ends each worker that it runs on must not end all of them.
_MAX_DEATHS = 3


class DaskExecutor:
    """Computes stages on the workers of a Dask cluster.

    Args:
        client: Connected to the scheduler.
        store: The store of the run.
        machines: Filled with the cluster's workers from now on.
        say: Called with messages for the user that are not errors.
    """

    at_once = True

    def __init__(self, client: Client, store: Store, machines: Machines, say: Callable[[str], None]) -> None:
        self._client = client
        self._machines = machines
        self._say = say
        self._run = uuid.uuid4().hex
        self._probe = json.dumps(vars(store.put("probe", self._run.encode())))
        self._events: dict[str, queue.Queue[dict[str, Any]]] = {}
        self._met: set[str] = set()
        self._asked: set[str] = set()
        self._reports: dict[str, tuple[float, float]] = {}
        """By worker: its last report by the scheduler's clock, and when that was first seen here."""
        self._closed = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    @functools.cached_property
    def machine(self) -> Machine:
        """The machine that files are timed on."""
        return self._machines.timing_worker().machine

    def check(self, recipe: Recipe) -> None:
        """Raise an error if a recipe asks for what the machine that times files lacks."""
        self.machine.find_runtimes(recipe.benchmark.runtimes, recipe.gate.runtimes)

    def compute(
        self,
        stage: Stage[..., Any],
        arguments: Mapping[str, Any],
        ingredients: Mapping[str, str],
        job: Job,
        started: Callable[[], None],
        check: Callable[[], None],
    ) -> Any:
        """The stage's outputs, computed on a worker.

        Raises:
            MachineError: If no worker can compute it, or it ended several.
        """
        request = {
            "stage": f"{stage.work.__module__}:{stage.name}",
            "arguments": {name: encode(value) for name, value in arguments.items()},
            "ingredients": dict(ingredients),
            "run": self._run,
            "alone": stage.alone,
        }
        label, needs = stage.label_for(arguments), find_needs(arguments)
        deaths: list[str] = []
        while len(deaths) < _MAX_DEATHS:
            with self._machines.slot(label, needs, alone=stage.alone) as worker:
                answer = self._ask(worker, request, job, started, check)
            if "outputs" in answer:
                return self._outputs_of(stage, answer, worker, job.store)
            if "died" in answer:
                deaths.append(f"{worker.name} ({answer['died']})")
                self._say(f"{label} is computed again: {worker.name} {answer['died']}.")
            else:
                self._judge(worker, answer)
        raise MachineError(
            f"{label} was given up after it failed {_MAX_DEATHS} times: {', '.join(deaths)}. If memory ran out there, "
            "give the workers fewer slots. Then run again: finished stages are kept."
        )

    def close(self) -> None:
        """End what still computes for this driver, and disconnect."""
        self._machines.stop(KeyboardInterrupt())
        self._closed.set()
        self._client.close(timeout=5)

    def _judge(self, worker: Worker, answer: Mapping[str, Any]) -> None:
        """Set a worker aside if it cannot compute the stage; raise an error if no other can either."""
        kind, message = answer["error"], answer["message"]
        if kind == remote.OTHER_CODE:
            fault = f"its quantflow, or what that uses, differs from this machine's: {message}"
        elif kind == "MachineError":
            fault = message.rstrip(".")
        elif kind:
            raise getattr(errors, kind, QuantflowError)(f"{message} (on {worker.name})")
        else:
            error = RuntimeError(f"{message} (on {worker.name})")
            error.add_note(answer.get("traceback", ""))
            raise error
        self._say(f"{worker.name} gets no more stages of this run: {fault}.")
        self._machines.set_aside(worker, fault)

    def _outputs_of(self, stage: Stage[..., Any], answer: Mapping[str, Any], worker: Worker, store: Store) -> Any:
        outputs = tuple(Ref(**fields) for fields in answer["outputs"])
        missing = next((ref for ref in outputs if not store.has(ref)), None)
        if missing is not None:
            raise StoreError(
                f"{worker.name} stored artifact {missing.sha256}, which this machine's store does not show, or shows "
                "damaged. Both must have the same home folder, or the same shared store."
            )
        return outputs if stage.num_outputs > 1 else outputs[0]

    def _ask(
        self,
        worker: Worker,
        request: Mapping[str, Any],
        job: Job,
        started: Callable[[], None],
        check: Callable[[], None],
    ) -> dict[str, Any]:
        """A worker's answer; `died` says how it ended without one."""
        with self._call(worker, request) as (future, events):
            num_events, has_begun = 0, False

            def handle(event: Mapping[str, Any]) -> None:
                nonlocal has_begun
                if "progress" in event:
                    job.progress(*event["progress"])
                elif "log" in event:
                    self._say(f"{worker.name}: {event['log']}")
                elif not has_begun:
                    has_begun = True
                    started()

            while not future.done():
                try:
                    event = events.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    event = {"done": True}
                if "done" not in event:
                    num_events += 1
                    handle(event)
                check()
                self._machines.check()
                if worker.is_gone:
                    return {"died": "is gone"}
            answer = self._fetch(future, worker)
            # Events take another way than the answer.
            for _ in range(answer.pop("num_events", 0) - num_events):
                try:
                    handle(events.get(timeout=1.0))
                except queue.Empty:
                    break
            handle({})
            return answer

    def _fetch(self, future: Any, worker: Worker) -> dict[str, Any]:
        if future.status == "error":
            raise MachineError(
                f"{worker.name} cannot run stages: {errors.reason_of(future.exception())}. Install the same quantflow "
                "there, then restart its worker."
            )
        try:
            answer: dict[str, Any] = json.loads(future.result(timeout=_FETCH_SECONDS))
        except Exception:
            # The worker has died, or the scheduler has: which one, is seen within moments.
            deadline = time.monotonic() + _FETCH_SECONDS
            while not worker.is_gone and time.monotonic() < deadline:
                self._machines.check()
                time.sleep(_LOOK_SECONDS / 2)
            return {"died": "is gone"}
        if "died" in answer:
            status = answer["died"]
            answer["died"] = f"ended its process with {f'signal {-status}' if status < 0 else f'status {status}'}"
        return answer

    @contextmanager
    def _call(self, worker: Worker, request: Mapping[str, Any]) -> Iterator[tuple[Any, queue.Queue[dict[str, Any]]]]:
        """Call a worker; cancel the call after the block, which ends what still computes."""
        identity = uuid.uuid4().hex
        topic = remote.TOPIC + identity
        events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._client.subscribe_topic(topic, lambda event: events.put(event[1]))
        future = self._client.submit(
            remote.compute,
            json.dumps({**request, "id": identity}),
            key=f"{request['stage']}-{identity}",
            workers=[worker.address],
            allow_other_workers=False,
            pure=False,
        )
        future.add_done_callback(lambda _: events.put({"done": True}))
        try:
            yield future, events
        finally:
            # A completed task whose future is held would run again if its worker died.
            if not future.done():
                future.cancel()
            future.release()
            self._client.unsubscribe_topic(topic)

    def _watch(self) -> None:
        """Look for workers that come and go."""
        while not self._closed.wait(_LOOK_SECONDS / 2):
            try:
                # Not `scheduler_info`: the client's own periodic look replaces what it returns, and sees no workers.
                assert self._client.scheduler is not None
                found = self._client.sync(self._client.scheduler.identity, n_workers=-1)["workers"]
            except Exception as error:
                if not self._closed.is_set():
                    self._machines.stop(_scheduler_is_gone(self._client, error))
                return
            found = self._without_silent(found)
            self._machines.keep(found)
            # In threads: a worker that hangs answers nothing.
            for address in found.keys() - self._met:
                self._met.add(address)
                threading.Thread(target=self._meet, args=(address, found[address]), daemon=True).start()
            self._met &= found.keys()
            for worker, paths in self._machines.unknown():
                if worker.address not in self._asked:
                    self._asked.add(worker.address)
                    threading.Thread(target=self._ask_for, args=(worker, paths), daemon=True).start()

    def _without_silent(self, workers: Mapping[str, Any]) -> dict[str, Any]:
        """The workers that have reported to the scheduler lately."""
        now = time.monotonic()
        before, self._reports = self._reports, {}
        for address, info in workers.items():
            reported, since = before.get(address, (None, now))
            self._reports[address] = info["last_seen"], since if reported == info["last_seen"] else now
        return {each: info for each, info in workers.items() if now - self._reports[each][1] < _SILENT_SECONDS}

    def _ask_for(self, worker: Worker, paths: list[str]) -> None:
        """Ask a worker which paths exist there."""
        try:
            answer = self._call_now(worker.address, remote.find_paths, json.dumps(paths))
            if answer is not None and "error" not in answer:
                self._machines.learn(worker, answer)
        finally:
            self._asked.discard(worker.address)

    def _meet(self, address: str, info: Mapping[str, Any]) -> None:
        """Ask a new worker what it is."""
        answer = self._call_now(address, remote.describe, self._probe) or {"error": "It does not answer"}
        name = str(info.get("name") or address)
        name = answer["machine"]["name"] if name == address and "machine" in answer else name
        fields = answer.get("machine", vars(_UNKNOWN))
        runtimes = tuple(Runtime(**each) for each in fields["runtimes"])
        machine = Machine(**{**fields, "engines": tuple(fields["engines"]), "runtimes": runtimes})
        worker = Worker(address, name, int(info["nthreads"]), machine)
        if not answer.get("holds"):
            worker.fault = answer.get("error", "").rstrip(".") or (
                f"its home {answer['home']} does not show what this machine stores: give both the same home folder, or "
                "the same shared store"
            )
            self._say(f"{name} gets no stages: {worker.fault}.")
        self._machines.join(worker)

    def _call_now(self, address: str, function: Callable[[str], str], argument: str) -> Any:
        """What a worker answers at once, whatever else it does; None if it does not."""
        try:
            answer = self._client.run(function, argument, workers=[address], on_error="return")[address]
        except Exception:
            return None  # It is gone, or will be.
        if isinstance(answer, Exception):  # Such as an import that fails there.
            return {"error": errors.reason_of(answer)}
        return json.loads(answer)


_UNKNOWN = Machine("unknown", "", "", (), "", (), "")


def _scheduler_is_gone(client: Client, error: Exception) -> MachineError:
    address = client.scheduler.addr if client.scheduler is not None else "its address"
    return MachineError(
        f"The Dask scheduler at {address} is gone ({errors.reason_of(error)}). Start it and its workers again, then "
        "the run: finished stages are kept."
    )
