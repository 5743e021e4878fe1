"""What stages have found, read while the flow goes on: what comes next can depend on it."""

from collections.abc import Iterable

from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.caching import PLANNER
from tasks.measure import Contender
from tasks.run import current_run


class NotYetKnownError(Exception):
    """A run that is only planned cannot say what a stage would find."""


def store_with(refs: Iterable[object]) -> Store:
    """The store that holds artifacts; in the place of one may stand what a plan has for it.

    Raises:
        NotYetKnownError: Where the run is only planned, and one of them is still to be made.
    """
    planner = PLANNER.get()
    if planner is None:
        return current_run().store
    if not all(isinstance(ref, Ref) for ref in refs):
        raise NotYetKnownError
    return planner.store


def read_samples(contenders: tuple[Contender, ...], timings: Ref) -> dict[Ref, dict[tuple[str, int, int], list[float]]]:
    """What `benchmark` found: milliseconds by file, then by (runtime, batch size, threads).

    Args:
        contenders: What was timed.
        timings: As `benchmark` gives them.

    Raises:
        NotYetKnownError: Where the run is only planned, and they were not timed before.
    """
    samples: dict[Ref, dict[tuple[str, int, int], list[float]]] = {}
    for timing in store_with((timings,)).read_json(timings):
        contender = contenders[timing["model"]]
        setting = contender.runtime.name, timing["batch_size"], timing["num_threads"]
        samples.setdefault(contender.artifact, {})[setting] = timing["samples_ms"]
    return samples
