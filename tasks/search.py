"""What a search learns about its trials. Not stages: these functions read the results of stages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from quantlib.measure import significance
from quantlib.recipe.branches import BranchRecipe
from quantlib.report import diagnosis
from quantlib.search import Trial
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.refs import BenchmarkTarget, VariantRefs
from tasks.report import read_predictions
from tasks.run import Run


def judge(run: Run, branch: BranchRecipe, baseline: VariantRefs, variant: VariantRefs) -> Trial:
    """The result of a trial on the selection images.

    Raises:
        NotYetKnownError: In a plan, if the trial has not run yet.
    """
    store = run.known((baseline.reference.selection, variant.reference))
    before = read_predictions(store, baseline.reference.selection).top1_correct
    after = read_predictions(store, variant.reference.selection).top1_correct
    paired = significance.paired_drop(before, after)
    return Trial(branch, paired.drop, paired.high)


def rank_layers(run: Run, parts: tuple[Ref, ...]) -> list[str]:
    """The layers that have weights, costliest first, from the results of `measure_layers`.

    Raises:
        NotYetKnownError: In a plan, if they have not been measured yet.
    """
    store = run.known(parts)
    rows = diagnosis.layer_rows("", "", [store.read_json(part) for part in parts])
    return [row.layer for row in diagnosis.costliest(rows) if row.weight_min is not None]


def costly_layers(run: Run, plan: Ref) -> list[list[str]]:
    """The sets of layers that may be faster in float, from the result of `plan_layers`.

    Raises:
        NotYetKnownError: In a plan, if the layers have not been planned yet.
    """
    layers: list[list[str]] = run.known(plan).read_json(plan)["costly_layers"]
    return layers


def with_samples(
    trial: Trial, targets: Sequence[BenchmarkTarget], samples: Mapping[Ref, Mapping[tuple[str, int, int], list[float]]]
) -> Trial:
    """A trial with the times of its file and runtime that are the fastest.

    Args:
        trial: The trial.
        targets: What was timed of it, at least one.
        samples: What `read_samples` returns.
    """
    timed = [samples[target.artifact][target.runtime.name, 1, 1] for target in targets]
    return replace(trial, samples_ms=min(timed, key=np.median))


def seconds_of(store: Store, keys: Iterable[str]) -> float:
    """How long stages took when they were computed, in this run or an earlier one."""
    records = map(store.read_record, keys)
    return sum(record.seconds for record in records if record is not None)
