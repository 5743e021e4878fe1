"""Runs of a small recipe in their own processes, which can be killed at any point of their work.

The processes are forked from a server that has imported everything, so that a run takes seconds. Nothing in quantflow
is replaced, except that all files count as equally fast: how fast a tiny net is on a busy machine is chance, and a
winner that depends on it could not be compared.
"""

import importlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.hosting.server import drain, set_defaults, start
from quantlib.store.artifacts import Ref
from quantlib.store.journal import Journal, read_runs
from quantlib.store.local import Store

RECIPE = {
    "name": "faults",
    "model": {
        "weights": "train",
        "arguments": {"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 2], [2, 16, 2, 2]]},
        "training": {"epochs": 1, "batch_size": 64},
    },
    "data": {"format": "digits", "resize": 16, "crop": 16, "train_flip": 0.0},
    "evaluation": {"max_images": 60, "num_held_out": 40},
    "calibration": {"batch_size": 16, "num_batches": 2},
    "ptq": [{"name": "per_channel"}],
    "qat": [
        {
            "name": "qat",
            "epochs": 2,
            "batches_per_epoch": 3,
            "batch_size": 16,
            "freeze_batch_norm_after_epoch": -1,
            "freeze_observer_after_epoch": 0,
        }
    ],
    "benchmark": {"num_samples": 10},
    "gate": {"max_top1_drop": 1.0},
}

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "flows.graphs.run",
        "flows.quantize",
        "quantlib.quantize.conversion",
        "quantlib.quantize.qat",
        "quantlib.models.training",
    ]
)


@contextmanager
def serve_prefect(folder: Path) -> Iterator[None]:
    """A Prefect server for the runs inside the block."""
    before = dict(os.environ)
    set_defaults(folder, verbose=False)
    try:
        with start(folder, print) as wait:
            wait()
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    exitcode: int
    """Exit code of its process; -9 if it was killed."""
    variants: list[dict[str, Any]]
    """The columns of the table that a second run of the same recipe must repeat."""
    points: list[str]
    """Every point of its work at which it could have been killed."""
    stages: dict[str, bool]
    """Whether each stage was reused, by label."""
    error: str
    said: list[str]
    """Messages to the user."""


def start_run(
    home: Path,
    *,
    kill_at: int | None = None,
    hold_at: str | None = None,
    run_id: str | None = None,
    recipe: dict[str, Any] = RECIPE,
    at_once: bool = False,
    engine: str = "local",
    environment: Mapping[str, str] | None = None,
    constants: Mapping[str, float] | None = None,
    body: Callable[[str | None, dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """Start a run in its own process.

    Args:
        home: Its home folder.
        kill_at: Kill it with SIGKILL at this point of its work, counted from 0.
        hold_at: Let it hang at the first point of this name; `process.held` then exists, until someone removes it.
        run_id: The run to resume.
        recipe: The recipe to run.
        at_once: Run independent stages in threads; they compute one at a time.
        engine: What computes the stages, as `--engine` takes it.
        environment: Added to the environment of the process.
        constants: Values of modules' constants in the process, by dotted name.
        body: What to run in place of the flow: called with `run_id` and `recipe`; returns what the outcome shows.
    """
    result = home.with_suffix(f".{os.urandom(4).hex()}.json")
    added = {**(environment or {}), "QUANTFLOW_HOME": str(home)}
    process = _forks.Process(
        target=_work,
        args=(added, str(result), kill_at, hold_at, run_id, recipe, at_once, engine, constants or {}, body),
    )
    process.result, process.held = result, result.with_suffix(".held")
    process.start()
    return process


def stage_lines(home: Path) -> list[dict[str, Any]]:
    """The lines that all runs of the home wrote about their stages."""
    runs = read_runs(home / "runs")
    return [line for run in runs for line in Journal(home / "runs" / run.file.run_id).stages()]


def newest_stage_lines(home: Path) -> list[dict[str, Any]]:
    """The lines that the home's newest run wrote about the stages it finished."""
    newest = read_runs(home / "runs")[0].file.run_id
    return [line for line in Journal(home / "runs" / newest).stages() if "cached" in line]


def computed(home: Path) -> Counter[str]:
    """How often each stage was computed, by key: whichever branch comes first computes a shared stage."""
    return Counter(line["key"] for line in stage_lines(home) if line.get("cached") is False)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in other processes."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "timed out waiting for the condition"
        time.sleep(0.1)


def keys_done(home: Path) -> dict[str, str]:
    """The key of every stage that the home's runs finished, by label."""
    return {line["label"]: line["key"] for line in stage_lines(home) if "cached" in line}


def outputs_of(home: Path) -> dict[str, tuple[Ref, ...]]:
    """The artifacts of every recorded stage by key, except for timings, which no two runs share."""
    return {r.key: r.outputs for r in Store(home / "store").records() if r.stage != "benchmark"}


def run_id_of(home: Path) -> str:
    """The newest run's id."""
    return read_runs(home / "runs")[0].file.run_id


def finish(process: Any, timeout: float = 240) -> Outcome:
    """Wait for a run to end."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the run did not end")
    found = json.loads(process.result.read_text()) if process.result.exists() else {}
    return Outcome(
        process.exitcode,
        found.get("variants", []),
        found.get("points", []),
        found.get("stages", {}),
        found.get("error", ""),
        found.get("said", []),
    )


def run(home: Path, **options: Any) -> Outcome:
    """Run until it ends or is killed."""
    return finish(start_run(home, **options))


def _work(
    environment: dict[str, str],
    result: str,
    kill_at: int | None,
    hold_at: str | None,
    run_id: str | None,
    recipe: dict[str, Any],
    at_once: bool,
    engine: str,
    constants: dict[str, float],
    body: Callable[[str | None, dict[str, Any]], dict[str, Any]] | None,
) -> None:
    os.environ |= environment
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    points: list[str] = []

    def pass_point(name: str) -> None:
        if len(points) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == hold_at and name not in points:
            held = Path(result).with_suffix(".held")
            held.touch()
            deadline = time.monotonic() + 600
            while held.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        points.append(name)

    _hook_points(pass_point)
    if at_once:
        _compute_in_threads()
    said: list[str] = []
    found: dict[str, Any] = {"points": points, "said": said}
    try:
        found |= body(run_id, recipe) if body else _run_flow(run_id, recipe, engine, said.append)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    Path(result).write_text(json.dumps(found, default=str))


def _run_flow(run_id: str | None, recipe: dict[str, Any], engine: str, say: Callable[[str], None]) -> dict[str, Any]:
    import torch

    from flows.graphs.run import make_flow
    from quantlib.measure import significance
    from quantlib.recipe.schema import parse_recipe
    from tasks.listener import NullListener
    from tasks.run import home_folder

    significance.is_slower = lambda *_: False  # type: ignore[assignment]
    # As in conftest.py: on a busy machine the threads of a tiny net only wait for each other.
    torch.set_num_threads(1)
    try:
        flow = make_flow("quantize", home_folder(), NullListener(), run_id, lambda _: None, engine, say)
        report = flow(parse_recipe(recipe))
    finally:
        drain()  # A forked process skips what Prefect does at exit.
    timed = {
        "latency_p50_ms",
        "speedup",
        "fastest_runtime",
        "fastest_p50_ms",
        "artifact_path",
        "torchscript_path",
        "onnx_path",
        "created_at",
    }
    return {
        "variants": [{k: v for k, v in vars(row).items() if k not in timed} for row in report.variants],
        "stages": {row.stage: row.cached for row in report.stages},
    }


def _compute_in_threads() -> None:
    from tasks.execution import LocalExecutor

    turn, compute = threading.Lock(), LocalExecutor.compute

    def compute_in_turn(*arguments: Any) -> Any:
        with turn:
            return compute(*arguments)

    LocalExecutor.at_once = True
    LocalExecutor.compute = compute_in_turn  # type: ignore[method-assign]


def _hook_points(pass_point: Callable[[str], None]) -> None:
    """Pass a point wherever a crash could fall: at stage boundaries, at progress inside stages, and at writes."""
    from quantlib.store.journal import Journal
    from tasks.execution import LiveRun

    def before(owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            pass_point(label(*args))
            return original(*args, **kwargs)

        setattr(owner, name, hooked)

    before(Journal, "stage_started", lambda _, label, *rest: f"before {label}")
    before(Journal, "stage_finished", lambda _, label, *rest: f"after {label}")
    before(LiveRun, "progress", lambda _, label, *rest: f"inside {label}")
    # In the middle of a write: the bytes are in the temporary file but not yet on disk; then not yet in place.
    before(os, "fsync", lambda *_: "write: flush")
    before(Path, "replace", lambda *_: "write: rename")
