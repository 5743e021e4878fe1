"""What the dashboard shows of a run besides its tasks' states: the progress of long stages, and the result.

The run itself creates these Prefect artifacts, not its stages: so a run whose stages are all reused has them, too.
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
from quantlib.report.results import Report
from tasks.calls import StoppedError

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.listener import Listener

_EVERY_SECONDS = 5.0
# Prefect retries a server that is gone for seconds, while the waiting stage should be computing.
_AFTER_FAILURE_SECONDS = 120.0
_LOGGER = logging.getLogger("prefect.quantflow")


class _ErrorsInALine(logging.Filter):
    """Logs an error that the user can fix as its message only, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, QuantflowError | StoppedError):
            record.msg, record.args, record.exc_info, record.exc_text = str(error), (), None, None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_ErrorsInALine())


class ProgressArtifacts:
    """Forwards a run's progress to a listener, and keeps a progress artifact for each long stage.

    Args:
        listener: Listener to forward to.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, listener: "Listener", clock: Callable[[], float] = time.monotonic) -> None:
        self._listener = listener
        self._clock = clock
        self._artifacts: dict[str, UUID] = {}
        self._told: dict[str, float] = {}
        self._silent_until = 0.0

    def stage_started(self, label: str) -> None:
        """Start the clock: a stage that finishes soon needs no artifact."""
        self._told[label] = self._clock()
        self._listener.stage_started(label)

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """Report to the dashboard every few seconds."""
        self._listener.stage_progressed(label, done, total)
        # Work outside a stage, such as hashing the images before the first one, is reported from its beginning.
        if self._clock() - self._told.get(label, 0.0) >= _EVERY_SECONDS:
            self._tell(label, 100.0 * done / total)
            self._told[label] = self._clock()

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """Fill the bar, if there is one."""
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
    """Put a run's result on the dashboard: one artifact per recipe, with one version per run."""
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
    """If the server is gone or refuses, the dashboard lacks an artifact, and the run loses nothing."""
    try:
        yield
    except Exception:
        failed()
        _LOGGER.warning("The run's progress could not be reported to the dashboard.", exc_info=True)
