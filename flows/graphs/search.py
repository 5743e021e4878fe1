"""The search: trials are ordinary branches, made one after the other of the same cached stages."""

from contextlib import suppress
from dataclasses import replace

from flows.graphs.branches import Trunk, layers_of, ptq_branch, qat_branch
from quantlib import search
from quantlib.recipe.branches import PTQRecipe, QATRecipe
from quantlib.recipe.sections import SearchRecipe
from quantlib.search import Trial
from tasks.findings import NotYetKnownError
from tasks.report import VariantRefs
from tasks.search import judge, rank_layers, save_best, seconds_of, stages_met


def search_branches(trunk: Trunk, baseline: VariantRefs) -> tuple[list[VariantRefs], str | None, str]:
    """The variants that the recipe's search tries, the best of them, and what is to be said of its end.

    A run that is only planned ends with the first trial that is new: what comes next depends on what it would find.
    """
    settings = trunk.recipe.search
    if settings is None:
        return [], None, ""
    variants: dict[str, VariantRefs] = {}
    trials: list[Trial] = []

    limit = ""
    with suppress(NotYetKnownError):
        limit = _try_in_turn(trunk, baseline, settings, variants, trials)
    best = search.best_trial(settings, trials).branch.name if trials else None
    return list(variants.values()), best, _conclusion(settings, trials, limit)


def _try_in_turn(
    trunk: Trunk, baseline: VariantRefs, settings: SearchRecipe, variants: dict[str, VariantRefs], trials: list[Trial]
) -> str:
    """Make trials until the search is over; `variants` and `trials` take them in.

    Returns:
        The limit that ended it, "" where it came to its own end.

    Raises:
        NotYetKnownError: Where the run is only planned, and the next step depends on what it would find.
    """

    def rank(name: str) -> list[str]:
        variant = variants[name]
        assert variant.prepared is not None
        layers = variant.layers or layers_of(trunk, variant.prepared, name, equalized=variant.equalized)
        variants[name] = replace(variant, layers=layers)
        return rank_layers(layers)

    images, shared = trunk.inputs.training, stages_met()
    # By what stages took, whenever that was: a clock would begin anew each time that the search is resumed.
    while seconds_of(stages_met() - shared) < 60 * settings.max_minutes:
        branch = search.next_trial(settings, trials, rank, images.stop - images.start)
        if branch is None:
            return ", at its limit," if len(trials) == settings.max_trials else ""
        assert isinstance(branch, PTQRecipe | QATRecipe)
        variant = ptq_branch(trunk, branch) if isinstance(branch, PTQRecipe) else qat_branch(trunk, branch)
        variants[branch.name] = variant
        trials.append(judge(branch, baseline, variant))
        best = search.best_trial(settings, trials)
        save_best(variants[best.branch.name].artifact)
    return f", at its limit of {_count(settings.max_minutes, 'minute')},"


def _conclusion(settings: SearchRecipe, trials: list[Trial], limit: str) -> str:
    if not trials:
        return "The search has no trial yet."
    best = search.best_trial(settings, trials)
    chosen = f"{best.branch.name}, {-100 * best.drop + 0.0:+.2f} points on the images that choices are made by"
    ended = f"The search ended after {_count(len(trials), 'trial')}{limit}"
    if search.is_inside(best, settings):
        return f"{ended} inside its budget: {chosen}."
    over = 100 * (best.drop - settings.max_top1_drop)
    return f"{ended} {over:.2f} points outside its budget of {100 * settings.max_top1_drop:.2f}; its best is {chosen}."


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
