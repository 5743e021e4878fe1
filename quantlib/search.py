"""The search for the fastest variant inside a budget: the trials so far decide what is tried next.

All settings that cost no speed come first: a few hundred images cannot tell which of two good ones is better, and
each takes only seconds, as calibration is shared. They end early only with a trial whose whole interval is inside the
budget. If one is inside, its layers in regions with many borders are tried in float, which may gain speed. If none is,
the costliest layers stay float, which costs speed. Training comes last: it costs time, but may be inside with every
layer int8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlib.measure import significance
from quantlib.recipe.branches import BranchRecipe, PTQRecipe, QATRecipe
from quantlib.recipe.sections import SearchRecipe

# Added to each other in this order, from the tutorial's cheapest setting on: the variant's name, and what it adds.
_FREE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("minmax", {"qconfig": "default", "activation_bits": "auto"}),
    ("equalized", {"equalize": True}),
    ("corrected", {"bias_correction": True}),
    ("per_channel", {"weights": "per_channel"}),
    ("mse", {"observer": "mse"}),
    ("smoothed", {"smoothing": 0.5}),
    ("percentile", {"observer": "percentile"}),
)
# How many of the costliest layers stay float.
_KEPT_IN_FLOAT = (1, 2, 4, 8)
# As in the tutorial: 8 epochs of 20 batches of 30 images.
_EPOCHS, _BATCHES, _BATCH_SIZE = 8, 20, 30
# A drop of exactly the budget must not fail through float64's rounding; one image is far more than this.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Trial:
    """A variant that was tried."""

    branch: BranchRecipe
    drop: float
    """Drop of top-1 against float, on the selection images."""
    high: float
    """Upper end of the drop's 95% interval."""
    samples_ms: Sequence[float] = ()
    """Times for one image on one thread, in the same rounds as those of other trials; empty: not timed."""

    @property
    def num_float_layers(self) -> int:
        """Layers kept in float: unless it is timed, each counts as a cost in speed."""
        return len(self.branch.float_layers)

    @property
    def p50_ms(self) -> float:
        """Median of the times."""
        return float(np.median(self.samples_ms))


def next_trial(
    search: SearchRecipe,
    trials: Sequence[Trial],
    rank_layers: Callable[[str], Sequence[str]],
    costly_layers: Callable[[str], Sequence[Sequence[str]]],
    num_training_images: int,
) -> BranchRecipe | None:
    """The variant to try next.

    Args:
        search: The budget, and how many trials it may take.
        trials: The trials so far, in order.
        rank_layers: Given a trial's name, its layers that can be kept in float, the costliest first; called only if no
            setting that costs no speed is inside the budget.
        costly_layers: Given a trial's name, the sets of its layers that may be faster in float; called only if a
            setting that costs no speed is inside the budget.
        num_training_images: How many images training may use.

    Returns:
        None when the search is over.
    """
    if len(trials) >= search.max_trials:
        return None
    free = [trial for trial in trials if isinstance(trial.branch, PTQRecipe) and trial.num_float_layers == 0]
    surely_inside = any(trial.high <= search.max_top1_drop for trial in free)
    if len(free) < len(_FREE) and not surely_inside:
        return free_trials(search)[len(trials)]
    number, best = len(trials) + 1, best_trial(search, free).branch
    tried = [trial.branch.float_layers for trial in trials]
    if surely_inside or any(is_inside(trial, search) for trial in free):
        left = [layers for each in costly_layers(best.name) if (layers := tuple(each)) not in tried]
        name = trial_name(number, f"regions-{len(trials) - len(free) + 1}")
        return best.model_copy(update={"name": name, "float_layers": left[0]}) if left else None
    if any(isinstance(trial.branch, QATRecipe) for trial in trials):
        return None
    kept = next((count for count in _KEPT_IN_FLOAT if count not in map(len, tried)), None)
    if kept is not None and not any(is_inside(trial, search) for trial in trials):
        layers = tuple(rank_layers(best.name)[:kept])
        if len(layers) == kept:
            return best.model_copy(update={"name": trial_name(number, f"float-{kept}"), "float_layers": layers})
    return _training(best, trial_name(number, "qat"), num_training_images)


def free_trials(search: SearchRecipe) -> list[PTQRecipe]:
    """The settings that cost no speed, in the order in which they are tried: the first trials, up to the limit.

    Only whether one is still tried depends on the results of those before.
    """
    found: list[PTQRecipe] = []
    options: dict[str, Any] = {}
    for number, (name, added) in enumerate(_FREE[: search.max_trials], start=1):
        options |= added
        found.append(PTQRecipe(name=trial_name(number, name), **options))
    return found


def best_trial(search: SearchRecipe, trials: Sequence[Trial]) -> Trial:
    """The fastest trial inside the budget, the most accurate among equals; if none is inside, the most accurate.

    Without times, a trial counts as faster the fewer layers it keeps in float. Once some are timed, the best is one of
    those.
    """
    inside = [trial for trial in trials if is_inside(trial, search)]
    timed = [trial for trial in inside if trial.samples_ms]
    if timed:
        fastest = min(timed, key=lambda trial: trial.p50_ms).samples_ms
        fast = [trial for trial in timed if not significance.is_slower(trial.samples_ms, fastest)]
        return min(fast, key=lambda trial: trial.drop)
    return min(inside or trials, key=lambda trial: (trial.num_float_layers if inside else 0, trial.drop))


def trials_to_time(search: SearchRecipe, trials: Sequence[Trial]) -> list[Trial]:
    """The trials inside the budget that only their speed can decide between: the best for each set of float layers.

    Empty if there is only one such set.
    """
    best: dict[frozenset[str], Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.drop):
        if is_inside(trial, search):
            best.setdefault(frozenset(trial.branch.float_layers), trial)
    return list(best.values()) if len(best) > 1 else []


def is_inside(trial: Trial, search: SearchRecipe) -> bool:
    """Whether a trial loses no more than the budget."""
    return trial.drop <= search.max_top1_drop + _TOLERANCE


def trial_name(number: int, what: str) -> str:
    """Name of a trial's variant, such as search-2-equalized; `number` counts from 1."""
    return f"search-{number}-{what}"


def _training(branch: BranchRecipe, name: str, num_images: int) -> QATRecipe:
    """QAT with a PTQ branch's options."""
    batch_size = max(2, min(_BATCH_SIZE, num_images))
    options = branch.model_dump() | {"name": name, "batch_size": batch_size, "epochs": _EPOCHS}
    return QATRecipe(**options, batches_per_epoch=max(1, min(_BATCHES, num_images // batch_size)))
