"""What the dashboard is told of a run beside the states of its tasks: how far long stages are, and the result.

Artifacts are made by whoever runs, never kept with a stage's outputs: so a run whose stages are all reused has them.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

from quantlib.errors import QuantflowError
from quantlib.report import summary
from quantlib.report.rows import Report

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.listener import Listener

_EVERY_SECONDS = 5.0
# Prefect asks a server that is gone again and again, for seconds: the stage that waits for it should compute.
_AFTER_FAILURE_SECONDS = 120.0
_LOGGER = logging.getLogger("prefect.quantflow")


class _ErrorsInALine(logging.Filter):
    """Logs an error that a user can fix as its message alone, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, QuantflowError):
            record.msg, record.args, record.exc_info, record.exc_text = str(error), (), None, None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_ErrorsInALine())


class ProgressArtifacts:
    """Passes on what a run does, and keeps a progress artifact for each stage that takes long.

    Args:
        listener: Whom it is passed on to.
        clock: Seconds that only go forward.
    """

    def __init__(self, listener: "Listener", clock: Callable[[], float] = time.monotonic) -> None:
        self._listener = listener
        self._clock = clock
        self._artifacts: dict[str, UUID] = {}
        self._told: dict[str, float] = {}
        self._silent_until = 0.0

    def stage_started(self, label: str) -> None:
        """Begin to count: a stage that is done soon needs no artifact."""
        self._told[label] = self._clock()
        self._listener.stage_started(label)

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """Tell the dashboard, every few seconds."""
        self._listener.stage_progressed(label, done, total)
        # What is no stage, as the hashing of the images before the first, is told from its beginning.
        if self._clock() - self._told.get(label, 0.0) >= _EVERY_SECONDS:
            self._tell(label, 100.0 * done / total)
            self._told[label] = self._clock()

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """Fill the bar, where there is one."""
        if label in self._artifacts:
            self._tell(label, 100.0)
            del self._artifacts[label]
        self._listener.stage_finished(label, cached=cached, seconds=seconds)

    def _tell(self, label: str, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._clock() < self._silent_until:
            return
        with _nothing_depends_on_it(self._be_silent):
            if label in self._artifacts:
                update_progress_artifact(self._artifacts[label], percent)
            else:
                created = create_progress_artifact(percent, description=label)
                assert isinstance(created, UUID)
                self._artifacts[label] = created

    def _be_silent(self) -> None:
        self._silent_until = self._clock() + _AFTER_FAILURE_SECONDS


def publish(report: Report, reports: "Path") -> None:
    """Put a run's result on the dashboard: one artifact, whose versions are the recipe's runs."""
    from prefect.artifacts import create_markdown_artifact

    recipe = report.variants[0].recipe
    with _nothing_depends_on_it():
        create_markdown_artifact(
            summary.summarize(report, reports), key=artifact_key(recipe), description=summary.headline(report)
        )


def artifact_key(recipe: str) -> str:
    """The key of a recipe's results: Prefect allows lower-case letters, digits and dashes."""
    return "quantflow-" + re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")


@contextmanager
def _nothing_depends_on_it(failed: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A server that is gone or refuses costs the dashboard its artifact, and the run nothing."""
    try:
        yield
    except Exception:
        failed()
        _LOGGER.warning("The dashboard was not told of the run's progress.", exc_info=True)
