"""Runs a flow in this process, for the command line."""

from __future__ import annotations

import importlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flows.hosting.cluster import LOCAL, parse_engine
from flows.hosting.processes import gc_paused
from flows.hosting.server import prefect_server
from quantlib.errors import MachineError, QuantflowError, explain_full_disk, reason_of

# Everything else is imported while the server starts.
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flows.graphs.many import Outcome
    from quantlib.recipe.schema import Recipe
    from quantlib.report.results import Report
    from tasks.listener import Listener

_REACH_SECONDS = 20.0


def run_here(
    name: str,
    recipe: Recipe,
    home: Path,
    listener: Listener,
    say: Callable[[str], None],
    *,
    run_id: str | None = None,
    engine: str = LOCAL,
    verbose: bool = False,
) -> Report:
    """Run a flow to its end.

    Args:
        name: quantize, ptq or qat.
        recipe: The recipe to run.
        home: The home folder.
        listener: Notified of each stage.
        say: Called with messages for the user that are not errors.
        run_id: The run to resume; None starts a new one.
        engine: What computes the stages, as `--engine` takes it.
        verbose: Show Prefect's own log.
    """
    finished: list[Report] = []

    def start() -> None:
        from flows.graphs.run import make_flow

        make_flow(name, home.resolve(), listener, run_id, finished.append, engine, say)(recipe)

    _run_in_prefect(start, finished, [recipe], home, say, engine, verbose=verbose)
    return finished[0]


def run_many_here(
    recipes: Sequence[Recipe],
    home: Path,
    listener: Listener,
    say: Callable[[str], None],
    *,
    engine: str = LOCAL,
    verbose: bool = False,
) -> list[Outcome]:
    """Run several recipes as one flow run.

    Args:
        recipes: The recipes to run, each with a name of its own.
        home: The home folder.
        listener: Notified of each stage.
        say: Called with messages for the user that are not errors.
        engine: What computes the stages, as `--engine` takes it.
        verbose: Show Prefect's own log.
    """
    finished: list[Outcome] = []

    def start() -> None:
        from flows.graphs.many import make_flow

        make_flow(home.resolve(), listener, finished.append, engine, say)(list(recipes))

    _run_in_prefect(start, finished, recipes, home, say, engine, verbose=verbose)
    return finished


def _run_in_prefect(
    start: Callable[[], None],
    finished: Sequence[object],
    recipes: Sequence[Recipe],
    home: Path,
    say: Callable[[str], None],
    engine: str,
    *,
    verbose: bool,
) -> None:
    """Run a flow with a Prefect server.

    Args:
        start: Runs the flow.
        finished: What the flow has added its results to, whatever happens to Prefect's flow run afterwards.
        recipes: The recipes that the flow runs.
        home: The home folder.
        say: Called with messages for the user that are not errors.
        engine: What computes the stages.
        verbose: Show Prefect's own log.
    """
    computes_here = parse_engine(engine) is None
    home = home.resolve()
    os.environ["QUANTFLOW_HOME"] = str(home)
    with prefect_server(home, say, verbose=verbose) as wait_for_server:
        with gc_paused():
            import httpx

            for recipe in recipes:
                _check(recipe, home, computes_here=computes_here)

            from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

            importlib.import_module("flows.graphs.run")
            from flows.hosting.crashes import mark_crashed_runs

        # Otherwise Prefect prints an error for each part of its log that it could not send.
        logging.raiseExceptions = verbose
        if wait_for_server is not None:
            # Importing torch's modules takes seconds; the server's start takes longer, on another core.
            with gc_paused():
                importlib.import_module("quantlib.graph.tracing")
            wait_for_server()
        try:
            # The heartbeat thread sleeps for a second before it notices that the flow has ended.
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                _reach_server()
                mark_crashed_runs(home)
                start()
        except Exception as error:
            # With a report, the journal says that the run is completed, and everything is written. Only Prefect does
            # not know it, or shows the run as failed because of a regression.
            if not finished:
                if isinstance(error, httpx.HTTPError):
                    raise _find_cause(error, home) from error
                raise


def _check(recipe: Recipe, home: Path, *, computes_here: bool) -> None:
    """Find wrong input while the server starts; the flow checks again, which takes no time."""
    from quantlib.inputs import find_inputs
    from quantlib.runtimes import available
    from quantlib.store.opening import open_store

    open_store(home)
    find_inputs(recipe, home / "splits")
    if computes_here:
        available.find_engine(recipe.engine)
        available.find_runtimes(recipe.benchmark.runtimes, recipe.gate.runtimes)


def _reach_server() -> None:
    """Let Prefect compare its version with the server's: it does so once, and never retries.

    Raises:
        MachineError: If there is no server for longer than a restart takes, or it has another version.
    """
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + _REACH_SECONDS
    while True:
        try:
            with get_client(sync_client=True) as client:
                client.raise_for_api_version_mismatch_once()
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise MachineError(
                    f"Prefect's server cannot be used: {error}. Start it, or unset PREFECT_API_URL: a run then starts "
                    "its own."
                ) from None
            time.sleep(0.2)
        else:
            return


def _find_cause(error: Exception, home: Path) -> Exception:
    """The error that a run failed with, or else why Prefect's server did not hear of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, QuantflowError):
        cause = cause.__context__
    if isinstance(cause, QuantflowError):
        return cause
    return explain_full_disk(home) or MachineError(
        f"Prefect's server gave an unexpected answer: {reason_of(error)} Its log is "
        f"{home / 'prefect' / 'server.log'}. Run again: finished stages are kept."
    )
