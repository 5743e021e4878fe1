"""The journal of runs: what each was to do, how far it came, and whether its process still lives.

runs/RUN/run.json        what the run is: its recipe, its flow, its process
runs/RUN/stages.jsonl    each stage it met, a line when it starts and a line when it is done
runs/RUN/outcome.json    how it ended; not there for a run that goes on, or that died
runs/RUN/lock            held by the run's process: the kernel frees it, however the process ends
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from quantlib.errors import QuantflowError, RecipeError
from quantlib.recipe import Recipe, parse_recipe
from quantlib.store import write_atomically

State = Literal["running", "completed", "failed", "crashed"]


@dataclass(frozen=True)
class RunFile:
    """What a run is."""

    run_id: str
    flow: str
    """quantize, ptq or qat."""
    recipe: dict[str, Any]
    started_at: str
    """ISO 8601, UTC; of the first attempt."""
    host: str
    pid: int
    flow_run_id: str | None
    """Prefect's, of the last attempt."""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands."""

    file: RunFile
    state: State
    num_stages: int
    """Stages it is done with."""
    stage: str
    """The last one it met."""
    keys: frozenset[str]
    """Of all stages it met."""
    message: str
    """Of a run that failed: the error's first line."""

    @property
    def recipe(self) -> Recipe:
        """The run's recipe.

        Raises:
            RecipeError: If it was written by a release whose recipes differ.
        """
        return parse_recipe(self.file.recipe)


class Journal:
    """The folder of one run.

    Args:
        folder: Made when the run begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.folder.name

    @contextmanager
    def record(self, flow: str, recipe: Recipe, flow_run_id: str | None) -> Iterator[None]:
        """Begin the run, or go on with it, and note how it ended.

        Raises:
            RecipeError: If the run's process still lives.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RecipeError(f"Run {self.run_id} is still running: wait for it, or stop its process first.") from None
        try:
            before = self._read("run.json")
            started_at = before.get("started_at", datetime.now(UTC).isoformat())
            self._remove_outcome()
            tables = recipe.model_dump(mode="json")
            host, pid = socket.gethostname(), os.getpid()
            self._write("run.json", asdict(RunFile(self.run_id, flow, tables, started_at, host, pid, flow_run_id)))
            yield
            self._write("outcome.json", {"state": "completed", "message": "", "finished_at": _now()})
        except Exception as error:
            message = f"{error}".partition("\n")[0] if isinstance(error, QuantflowError) else repr(error)
            self._write("outcome.json", {"state": "failed", "message": message, "finished_at": _now()})
            raise
        finally:
            lock.release()

    def stage_started(self, label: str, key: str) -> None:
        """Note that the run needs a stage; from then on the stage's artifacts are in use."""
        self._append({"label": label, "key": key, "at": _now()})

    def stage_finished(self, label: str, key: str, *, cached: bool) -> None:
        """Note that the run has what a stage gives."""
        self._append({"label": label, "key": key, "at": _now(), "cached": cached})

    def stages(self) -> list[dict[str, Any]]:
        """The lines of stages.jsonl; one that a crash cut short is left out."""
        try:
            lines = (self.folder / "stages.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [line for line in map(_parse, lines) if line is not None]

    def status(self) -> RunStatus | None:
        """How the run stands; None where the folder holds no run."""
        try:
            file = RunFile(**self._read("run.json"))
        except TypeError:
            return None
        outcome, stages = self._read("outcome.json"), self.stages()
        return RunStatus(
            file=file,
            state=outcome.get("state") or ("running" if self._is_alive() else "crashed"),
            num_stages=len({line["label"] for line in stages if "cached" in line}),
            stage=stages[-1]["label"] if stages else "",
            keys=frozenset(line["key"] for line in stages),
            message=outcome.get("message", ""),
        )

    def _is_alive(self) -> bool:
        lock = self._lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _lock(self) -> FileLock:
        # Not shared between Journal objects of one process: a run must see itself as running.
        return FileLock(self.folder / "lock", is_singleton=False)

    def _remove_outcome(self) -> None:
        (self.folder / "outcome.json").unlink(missing_ok=True)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / name, json.dumps(content, indent=1).encode())

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _append(self, line: dict[str, Any]) -> None:
        with (self.folder / "stages.jsonl").open("a", encoding="utf-8") as file:
            # The break before it ends a line that a crash has cut short.
            file.write(f"\n{json.dumps(line)}\n")


def read_runs(folder: Path) -> list[RunStatus]:
    """All runs below a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [Journal(place).status() for place in folder.iterdir() if place.is_dir()]
    return sorted((s for s in found if s is not None), key=lambda s: (s.file.started_at, s.file.run_id), reverse=True)


def find_unfinished(folder: Path, run_id: str | None) -> RunStatus:
    """The run to go on with.

    Args:
        folder: Of all runs.
        run_id: Which; None: the newest that crashed or failed.

    Raises:
        RecipeError: If there is none.
    """
    runs = read_runs(folder)
    unfinished = [run for run in runs if run.state in {"crashed", "failed"}]
    if run_id is None:
        if not unfinished:
            raise RecipeError(f"Nothing to resume: none of the {len(runs)} runs has crashed or failed.")
        return unfinished[0]
    named = next((run for run in runs if run.file.run_id == run_id), None)
    if named is None:
        names = ", ".join(run.file.run_id for run in unfinished) or "none"
        raise RecipeError(f"No run {run_id!r}. Unfinished runs: {names}; `quantflow runs` lists all.")
    if named not in unfinished:
        raise RecipeError(f"Run {run_id!r} is {named.state}: only one that crashed or failed can be resumed.")
    return named


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and {"label", "key"} <= parsed.keys() else None
