"""What stages have found, read while the flow goes on: what comes next can depend on it."""

from collections.abc import Collection, Iterable

from quantlib import verdict
from quantlib.machine import Runtime
from quantlib.store import Ref, Store
from tasks.caching import PLANNER
from tasks.measure import Contender
from tasks.run import current_run


class NotYetKnownError(Exception):
    """A run that is only planned cannot say what a stage would find."""


def store_with(refs: Iterable[Ref]) -> Store:
    """The store that holds artifacts.

    Raises:
        NotYetKnownError: Where the run is only planned, and one of them is still to be made.
    """
    planner = PLANNER.get()
    if planner is None:
        return current_run().store
    if not all(isinstance(ref, Ref) for ref in refs):
        raise NotYetKnownError
    return planner.store


def fastest_runtime(contenders: tuple[Contender, ...], timings: Ref, file: Ref, allowed: Collection[str]) -> Runtime:
    """The runtime that a file was fastest in, by what `benchmark` found.

    Args:
        contenders: What was timed.
        timings: As `benchmark` gives them.
        file: Timed in one of `allowed` at least.
        allowed: Names of runtimes.

    Raises:
        NotYetKnownError: Where the run is only planned, and this was not timed before.
    """
    samples = {}
    for timing in store_with((timings,)).read_json(timings):
        contender = contenders[timing["model"]]
        here = contender.artifact == file and contender.runtime.name in allowed
        if here and (timing["batch_size"], timing["num_threads"]) == (1, 1):
            samples[contender.runtime] = timing["samples_ms"]
    return verdict.fastest_runtime(samples)
