"""The process on a worker that computes stages, one after the other: a worker can kill it, as it cannot kill a thread.

Requests and answers are lines of JSON. It exits when the worker is gone, however that ended.
"""

import functools
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantlib import identity
from quantlib.data.split import SplitInput
from quantlib.errors import MachineError, QuantflowError, explain_refusal
from quantlib.models.source import ModelInput
from quantlib.process import begin_to_answer
from quantlib.progress import Progress
from quantlib.runtimes import available
from quantlib.runtimes.available import Machine
from quantlib.store.local import Store
from quantlib.store.opening import open_store
from tasks.cluster.codec import decode
from tasks.cluster.needs import find_needs
from tasks.planning import explain_difference
from tasks.stage import Job, Stage, find_inside, key_of

OTHER_CODE = "other code"
_EVERY_SECONDS = 0.25


def answer(request: Mapping[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compute a stage.

    Args:
        request: Its name, arguments, ingredients as the driver found them, and the home folder of this machine.
        tell: Called with `began` when the stage begins to compute, then with its `progress`.

    Returns:
        `outputs`, or `error` (the name of its class) and `message`.
    """
    home = Path(request["home"])
    try:
        stage, arguments = _find_stage(request["stage"]), {n: decode(v) for n, v in request["arguments"].items()}
        own = stage.ingredients(arguments)
        if key_of(own) != key_of(request["ingredients"]):
            return {"error": OTHER_CODE, "message": explain_difference(own, request["ingredients"])}
        _check_here(arguments, home, request["run"])
        tell({"began": True})
        store = _store(home)
        with store.in_use():
            outputs = stage.work(Job(store, _reporter(tell)), **arguments)
    except QuantflowError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        refusal = explain_refusal(error, error.filename or home) if isinstance(error, OSError) else None
        if refusal is not None:
            return {"error": "MachineError", "message": str(refusal)}
        return {"error": "", "message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    return {"outputs": [asdict(ref) for ref in found]}


@functools.cache
def _store(home: Path) -> Store:
    return open_store(home)


def _find_stage(name: str) -> Stage[..., Any]:
    """The stage "tasks.module:function"."""
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None) if module.startswith("tasks.") else None
    if not isinstance(found, Stage):
        raise ValueError(f"{name} is no stage.")  # noqa: TRY004 (a name that means something else)
    return found


def _check_here(arguments: Mapping[str, Any], home: Path, run: str) -> None:
    """Raise an error if something that the stage reads outside the store is not what the flow found.

    Raises:
        MachineError: If it is not.
    """
    lacking = find_needs(arguments).lacking(_this_machine())
    if lacking:
        raise MachineError(f"The stage needs {lacking}.")
    for split in find_inside(arguments, SplitInput):
        _check_split(split, home / "splits", run)
    for model in find_inside(arguments, ModelInput):
        _check_model(model, run)


@functools.cache  # A worker ends the process when a library was installed.
def _this_machine() -> Machine:
    return available.this_machine()


@functools.lru_cache(maxsize=16)
def _check_split(split: SplitInput, notes: Path, run: str) -> None:
    identity.check_split(split, notes)


@functools.lru_cache(maxsize=16)
def _check_model(model: ModelInput, run: str) -> None:
    identity.check_model(model)


def _reporter(tell: Callable[[dict[str, Any]], None]) -> Progress:
    """Progress that tells at most a few times per second."""
    last = [0.0]

    def report(done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last[0] >= _EVERY_SECONDS:
            last[0] = now
            tell({"progress": [done, total]})

    return report


def _serve() -> None:
    answers = begin_to_answer()

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    for line in sys.stdin:
        tell(answer(json.loads(line), tell))


if __name__ == "__main__":
    _serve()
