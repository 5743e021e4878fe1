"""What a search is told of its trials. No stages: they read what stages have found, and lay out the best file."""

from collections.abc import Iterable

from quantlib.measure import significance
from quantlib.recipe.branches import BranchRecipe
from quantlib.report import diagnosis
from quantlib.search import Trial
from quantlib.store.artifacts import Ref
from tasks.caching import PLANNER
from tasks.findings import store_with
from tasks.report import VariantRefs, read_predictions
from tasks.run import current_run


def judge(branch: BranchRecipe, baseline: VariantRefs, variant: VariantRefs) -> Trial:
    """How a trial did on the images that choices are made by.

    Raises:
        NotYetKnownError: Where the run is only planned, and the trial was not made before.
    """
    store = store_with((*baseline.selection, variant.artifact, *variant.chosen.selection))
    before = read_predictions(store, baseline.selection).top1_correct
    after = read_predictions(store, variant.chosen.selection).top1_correct
    paired = significance.paired_drop(before, after)
    return Trial(branch, paired.drop, paired.high)


def rank_layers(parts: tuple[Ref, ...]) -> list[str]:
    """The layers that have weights, the costliest first, from what `measure_layers` has found.

    Raises:
        NotYetKnownError: Where the run is only planned, and they were not measured before.
    """
    store = store_with(parts)
    rows = diagnosis.layer_rows("", "", [store.read_json(part) for part in parts])
    return [row.layer for row in diagnosis.costliest(rows) if row.weight_min is not None]


def stages_met() -> frozenset[str]:
    """The keys of the stages that the run has met so far."""
    planner = PLANNER.get()
    return frozenset(planner.keys if planner else (row.key for row in current_run().stages))


def seconds_of(keys: Iterable[str]) -> float:
    """What stages took when they were computed, in this run or in one before."""
    planner = PLANNER.get()
    store = planner.store if planner else current_run().store
    records = map(store.read_record, keys)
    return sum(record.seconds for record in records if record is not None)


def save_best(artifact: Ref) -> None:
    """Lay out the best file so far as models/RUN/search-best.pt, to be shipped if need be before the run ends."""
    if PLANNER.get() is None:
        run = current_run()
        run.store.lay_out(artifact, run.home / "models" / run.run_id / "search-best.pt")
