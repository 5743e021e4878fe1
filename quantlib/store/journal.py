"""The journal of runs: what each should do, how far it got, and whether its process is still alive.

runs/RUN/run.json        what the run is: its recipe, its flow, its process
runs/RUN/stages.jsonl    each stage it reached: one line when it starts and one when it is done
runs/RUN/outcome.json    how it ended; missing for a run that is still going, or that died
runs/RUN/lock            held by the run's process: the kernel releases it, however the process ends

Runs are read for as long as their folders exist: whatever happened to an old one is reported, and stops nothing.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired
from uuid import UUID

from filelock import FileLock, Timeout
from pydantic import AfterValidator, AwareDatetime, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from quantlib.errors import MachineError, QuantflowError, RecipeError, is_interrupt
from quantlib.files import explaining_full_disk, lockable, read_file, seal, unseal, write_atomically
from quantlib.recipe.schema import Recipe, parse_recipe

State = Literal["running", "completed", "failed", "crashed", "damaged"]
_DATE = TypeAdapter(AwareDatetime)


def _check_date(text: str) -> str:
    _DATE.validate_python(text)
    return text


def _check_uuid(text: str) -> str:
    UUID(text)
    return text


Date = Annotated[str, AfterValidator(_check_date)]


@dataclass(frozen=True)
class RunFile:
    """What a run is."""

    run_id: str
    flow: str
    """quantize, ptq or qat."""
    recipe: dict[str, Any]
    started_at: Date
    """Start of the first attempt: ISO 8601, UTC."""
    host: str
    pid: int
    flow_run_id: Annotated[str, AfterValidator(_check_uuid)] | None
    """Prefect's id of the last attempt."""


class StageLine(TypedDict):
    """A line of stages.jsonl."""

    label: str
    key: str
    at: NotRequired[str]
    cached: NotRequired[bool]
    """Only once the run has the stage's result: whether that was reused."""


class _Outcome(TypedDict):
    state: Literal["completed", "failed"]
    message: str
    finished_at: Date


_RUN_FILE, _STAGE_LINE, _OUTCOME = TypeAdapter(RunFile), TypeAdapter(StageLine), TypeAdapter(_Outcome)


@dataclass(frozen=True)
class RunStatus:
    """The status of a run."""

    file: RunFile
    state: State
    num_stages: int
    """Stages that are done."""
    stage: str
    """The last stage it reached."""
    keys: frozenset[str]
    """Keys of all stages that it reached."""
    message: str
    """First line of the error of a failed run; what is damaged in a damaged one."""

    @property
    def recipe(self) -> Recipe:
        """The run's recipe.

        Raises:
            RecipeError: If it was written by a release with different recipes.
        """
        return parse_recipe(self.file.recipe)


class Journal:
    """The folder of one run.

    Args:
        folder: Created when the run begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.folder.name

    @contextmanager
    def record(self, flow: str, recipe: Recipe, flow_run_id: str | None) -> Iterator[None]:
        """Begin or resume the run, and note how it ends.

        Raises:
            RecipeError: If the run's process is still alive.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RecipeError(f"Run {self.run_id} is still running: wait for it, or stop its process first.") from None
        try:
            before = self.status()
            started_at = before.file.started_at if before is not None else _now()
            self._remove_outcome()
            tables = recipe.model_dump(mode="json")
            host, pid = socket.gethostname(), os.getpid()
            self._write("run.json", asdict(RunFile(self.run_id, flow, tables, started_at, host, pid, flow_run_id)))
            yield
            self._write("outcome.json", {"state": "completed", "message": "", "finished_at": _now()})
        except Exception as error:
            if is_interrupt(error):
                raise KeyboardInterrupt from error
            message = f"{error}".partition("\n")[0] if isinstance(error, QuantflowError) else repr(error)
            self._write("outcome.json", {"state": "failed", "message": message, "finished_at": _now()})
            raise
        finally:
            lock.release()

    def stage_started(self, label: str, key: str) -> None:
        """Note that the run needs a stage; from then on the stage's artifacts are in use."""
        self._append({"label": label, "key": key, "at": _now()})

    def stage_finished(self, label: str, key: str, *, cached: bool) -> None:
        """Note that the run has a stage's result."""
        self._append({"label": label, "key": key, "at": _now(), "cached": cached})

    def stages(self) -> list[StageLine]:
        """The lines of stages.jsonl; one that a crash cut short, or that is damaged, is left out."""
        try:
            lines = read_file(self.folder / "stages.jsonl").split(b"\n")
        except OSError:
            return []
        return [line for line in map(_parse, lines) if line is not None]

    def status(self) -> RunStatus | None:
        """The run's status; None if the folder holds no run."""
        if not os.path.lexists(self.folder / "run.json"):
            return None
        stages, file, message = self.stages(), self._unreadable(), ""
        state: State
        try:
            file = _RUN_FILE.validate_python(self._read("run.json"))
            if file.run_id != self.run_id:
                raise ValueError("it belongs to another run")  # noqa: TRY301 (reported like all other damage)
            if os.path.lexists(self.folder / "outcome.json"):
                outcome = _OUTCOME.validate_python(self._read("outcome.json"), strict=True)
                state, message = outcome["state"], outcome["message"]
            else:
                state = "running" if self._is_alive() else "crashed"
        except (OSError, ValueError, MachineError) as error:
            state, message = "damaged", _first_line(error)
        return RunStatus(
            file=file,
            state=state,
            num_stages=len({line["label"] for line in stages if "cached" in line}),
            stage=stages[-1]["label"] if stages else "",
            keys=frozenset(line["key"] for line in stages),
            message=message,
        )

    def _unreadable(self) -> RunFile:
        """A stand-in for an unreadable run.json, from what the folder itself shows."""
        changed = datetime.fromtimestamp(self.folder.stat().st_mtime, UTC).isoformat()
        return RunFile(self.run_id, "", {}, changed, "", 0, None)

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
        return FileLock(lockable(self.folder / "lock"), is_singleton=False)

    def _remove_outcome(self) -> None:
        (self.folder / "outcome.json").unlink(missing_ok=True)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / name, seal(content))

    def _read(self, name: str) -> dict[str, Any]:
        """The fields that were written to a file of the run.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If it is damaged.
        """
        try:
            return unseal(read_file(self.folder / name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _append(self, line: StageLine) -> None:
        file_path = lockable(self.folder / "stages.jsonl")
        with explaining_full_disk(self.folder), file_path.open("a", encoding="utf-8") as file:
            # The leading line break ends a line that a crash has cut short.
            file.write(f"\n{json.dumps(line)}\n")


def read_runs(folder: Path) -> list[RunStatus]:
    """All runs below a folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [Journal(place).status() for place in folder.iterdir() if place.is_dir()]
    return sorted((s for s in found if s is not None), key=lambda s: (s.file.started_at, s.file.run_id), reverse=True)


def find_run(folder: Path, run_id: str) -> RunStatus:
    """A run by its name.

    Raises:
        RecipeError: If there is none with that name.
    """
    runs = read_runs(folder)
    named = next((run for run in runs if run.file.run_id == run_id), None)
    if named is None:
        names = ", ".join(run.file.run_id for run in runs[:5]) or "none"
        raise RecipeError(f"No run {run_id!r}. The newest are: {names}; `quantflow runs` lists all.")
    return named


def find_unfinished(folder: Path, run_id: str | None) -> RunStatus:
    """The run to resume.

    Args:
        folder: The folder of all runs.
        run_id: The run; None: the newest that crashed or failed. A completed run that is named makes its report again.

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
    if named.state == "damaged":
        raise RecipeError(
            f"Run {run_id!r} is damaged ({named.message}): run its recipe again; what it has computed is reused."
        )
    if named.state == "running":
        raise RecipeError(f"Run {run_id!r} is still running: wait for it, or stop its process first.")
    return named


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _parse(line: bytes) -> StageLine | None:
    try:
        return _STAGE_LINE.validate_json(line, strict=True)
    except ValidationError:
        return None


def _first_line(error: Exception) -> str:
    """What is damaged, in one line."""
    if isinstance(error, ValidationError):
        details = error.errors()[0]
        where = ".".join(str(part) for part in details["loc"])
        return f"{where}: {details['msg']}" if where else str(details["msg"])
    return str(error).partition("\n")[0]
