"""The search: trials are ordinary branches, which start from the same cached stages."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from flows.graphs.branches import layers_of, ptq_branch, qat_branch
from flows.graphs.evaluation import evaluate_selection, targets_of, time_files
from flows.graphs.shared_stages import SharedStages
from quantlib import search
from quantlib.recipe.branches import BranchRecipe, PTQRecipe, QATRecipe
from quantlib.recipe.sections import SearchRecipe
from quantlib.search import Trial
from tasks.refs import VariantRefs
from tasks.report import read_samples
from tasks.run import NotYetKnownError
from tasks.search import costly_layers, judge, rank_layers, seconds_of, with_samples


def search_branches(stages: SharedStages, baseline: VariantRefs) -> tuple[list[VariantRefs], str | None, str]:
    """The variants that the recipe's search tries, the best of them, and a note on how it ended.

    A plan ends with the first new trial: what comes next depends on its result.
    """
    settings = stages.recipe.search
    if settings is None:
        return [], None, ""
    variants: dict[str, VariantRefs] = {}
    trials: list[Trial] = []

    limit = ""
    with suppress(NotYetKnownError):
        limit = _try_in_turn(stages, baseline, settings, variants, trials)
        _time_rivals(stages, settings, variants, trials)
    best = search.best_trial(settings, trials).branch.name if trials else None
    return list(variants.values()), best, _conclusion(settings, trials, limit)


def _try_in_turn(
    stages: SharedStages,
    baseline: VariantRefs,
    settings: SearchRecipe,
    variants: dict[str, VariantRefs],
    trials: list[Trial],
) -> str:
    """Run trials until the search is over, adding them to `variants` and `trials`.

    Where stages run at once, those that cost no speed are begun together: what was not needed in the end is forgotten.

    Returns:
        The limit that ended it; "" if it ended by itself.

    Raises:
        NotYetKnownError: In a plan, if the next step depends on a result that is not there yet.
    """

    def rank(name: str) -> list[str]:
        refs = variants[name]
        assert refs.model is not None
        (branch,) = (trial.branch for trial in trials if trial.branch.name == name)
        layers = refs.layers or layers_of(stages, refs.model, branch)
        variants[name] = replace(refs, layers=layers)
        return rank_layers(stages.run, layers)

    def find_costly(name: str) -> list[list[str]]:
        plan = variants[name].plan
        assert plan is not None
        return costly_layers(stages.run, plan)

    images, run = stages.inputs.training, stages.run
    before = set(run.keys)
    begun: dict[str, Callable[[], VariantRefs]] = {}
    if run.at_once:
        begun = {each.name: run.begin(partial(_try, stages, each)) for each in search.free_trials(settings)}
    # Counts what the stages took when they were computed: a clock would start over each time the search is resumed.
    while seconds_of(run.store, set(run.keys) - before) < 60 * settings.max_minutes:
        branch = search.next_trial(settings, trials, rank, find_costly, images.stop - images.start)
        if branch is None:
            return ", at its limit," if len(trials) == settings.max_trials else ""
        variant = begun.get(branch.name, partial(_try, stages, branch))()
        variants[branch.name] = variant
        trials.append(judge(run, branch, baseline, variant))
        _save_best(stages, settings, variants, trials)
    return f", at its limit of {_count(settings.max_minutes, 'minute')},"


def _try(stages: SharedStages, branch: BranchRecipe) -> VariantRefs:
    assert isinstance(branch, PTQRecipe | QATRecipe)
    variant = ptq_branch(stages, branch) if isinstance(branch, PTQRecipe) else qat_branch(stages, branch)
    return replace(variant, reference=evaluate_selection(stages, branch.name, variant.reference))


def _save_best(
    stages: SharedStages, settings: SearchRecipe, variants: dict[str, VariantRefs], trials: list[Trial]
) -> None:
    """Copy the best trial's file to where it can be shipped from before the run ends, if need be."""
    best = variants[search.best_trial(settings, trials).branch.name].reference
    stages.run.copy_out(best.file, f"search-best{best.runtime.suffix}")


def _time_rivals(
    stages: SharedStages, settings: SearchRecipe, variants: dict[str, VariantRefs], trials: list[Trial]
) -> None:
    """Add times to the `trials` that only these can decide between: all from one stage, so that they compare.

    Raises:
        NotYetKnownError: In a plan, if they have not been timed yet.
    """
    names = [trial.branch.name for trial in search.trials_to_time(settings, trials)]
    found = {name: [each for each in targets_of(variants[name]) if stages.may_ship(each.runtime)] for name in names}
    targets = {name: own for name, own in found.items() if own}
    if len(targets) < 2:
        return
    timed = tuple(dict.fromkeys(target for own in targets.values() for target in own))
    timings = time_files(stages, timed, (1,), (1,), "search")
    samples = read_samples(stages.run.known(timings), timed, timings)
    for place, trial in enumerate(trials):
        if trial.branch.name in targets:
            trials[place] = with_samples(trial, targets[trial.branch.name], samples)
    _save_best(stages, settings, variants, trials)


def _conclusion(settings: SearchRecipe, trials: list[Trial], limit: str) -> str:
    if not trials:
        return "The search has no trial yet."
    best = search.best_trial(settings, trials)
    chosen = f"{best.branch.name}, {-100 * best.drop + 0.0:+.2f} points on the selection images"
    if best.samples_ms:
        chosen += f", {best.p50_ms:.3g} ms per image"
    ended = f"The search ended after {_count(len(trials), 'trial')}{limit}"
    if search.is_inside(best, settings):
        return f"{ended} inside its budget: {chosen}."
    over = 100 * (best.drop - settings.max_top1_drop)
    return f"{ended} {over:.2f} points outside its budget of {100 * settings.max_top1_drop:.2f}; its best is {chosen}."


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
