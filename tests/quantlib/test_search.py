"""What the search tries next, decided only by the trials so far."""

from dataclasses import replace

import pytest

from quantlib.errors import RecipeError
from quantlib.recipe.branches import PTQRecipe, QATRecipe
from quantlib.recipe.file import override_recipe
from quantlib.recipe.schema import parse_recipe
from quantlib.recipe.sections import SearchRecipe
from quantlib.search import Trial, best_trial, next_trial, trials_to_time

FREE = ["minmax", "equalized", "corrected", "per_channel", "mse", "smoothed", "percentile"]
RECIPE = {"name": "r", "model": {"weights": "train"}, "data": {"format": "digits"}}


def _search(outcomes, high=1.0, costly=(), **settings):
    """A search, its trials and the ranked names; `outcomes` gives each trial's drop by the end of its name."""
    search, trials, ranked = SearchRecipe(**settings), [], []

    def rank(name):
        ranked.append(name)
        return [f"layer{n}" for n in range(20)]

    while (branch := next_trial(search, trials, rank, lambda _: costly, 1000)) is not None:
        trials.append(Trial(branch, outcomes.get(branch.name.split("-", 2)[2], 0.1), high))
    return search, trials, ranked


def _names(trials):
    return [trial.branch.name.split("-", 2)[2] for trial in trials]


def test_the_first_trial_is_the_cheapest_setting_and_each_next_adds_one_thing():
    _, trials, _ = _search({"minmax": 0.0})
    assert _names(trials) == FREE
    first, second = trials[0].branch, trials[1].branch
    assert (first.qconfig, first.equalizes, first.corrects_bias) == ("default", False, False)
    assert second == first.model_copy(update={"name": second.name, "equalize": True})
    assert trials[3].branch.scheme(8).weights == "per_channel"
    assert trials[4].branch.scheme(8).observer == "mse"
    assert [trial.branch.smoothing for trial in trials] == [None, None, None, None, None, 0.5, 0.5]


def test_all_free_settings_are_tried_unless_one_is_inside_for_sure():
    assert _names(_search({"minmax": 0.0})[1]) == FREE
    assert _names(_search({"minmax": 0.0}, high=0.001)[1]) == ["minmax"]


def test_where_a_free_setting_is_inside_neither_layers_nor_training_are_tried():
    search, trials, ranked = _search({"corrected": 0.002, "mse": 0.001})
    assert _names(trials) == FREE
    assert ranked == []
    assert best_trial(search, trials).branch.name == "search-5-mse"


COSTLY = (("a",), ("a", "b"))


def test_where_a_free_setting_is_inside_it_is_tried_with_the_costly_regions_in_float():
    _, trials, ranked = _search({"corrected": 0.001, "mse": 0.002}, costly=COSTLY)
    assert _names(trials) == [*FREE, "regions-1", "regions-2"]
    assert ranked == []
    for trial, layers in zip(trials[7:], COSTLY, strict=True):
        expected = {"name": trial.branch.name, "float_layers": layers}
        assert trial.branch == trials[2].branch.model_copy(update=expected)
    assert _names(_search({"minmax": 0.0}, high=0.001, costly=COSTLY)[1]) == ["minmax", "regions-1", "regions-2"]
    assert len(_search({"mse": 0.0}, costly=COSTLY, max_trials=8)[1]) == 8


def test_where_no_free_setting_is_inside_no_region_is_tried():
    assert not any("regions" in name for name in _names(_search({"float-2": 0.0}, costly=COSTLY)[1]))


def timed(trial, times):
    return replace(trial, samples_ms=tuple(times))


def test_what_was_timed_decides_and_not_the_number_of_float_layers():
    search, trials, _ = _search({"mse": 0.001, "regions-1": 0.0015, "regions-2": 0.0019}, costly=COSTLY)
    assert best_trial(search, trials).branch.name == "search-5-mse"
    assert _names(trials_to_time(search, trials)) == ["mse", "regions-1", "regions-2"]
    slow, fast = [3.0 + n / 100 for n in range(20)], [2.0 + n / 100 for n in range(20)]
    noisy = [time + (-1) ** n / 10 for n, time in enumerate(fast)]
    rest = trials[:4] + trials[5:7]
    chosen = [
        best_trial(search, [*rest, timed(trials[4], own), timed(trials[7], one), timed(trials[8], two)]).branch.name
        for own, one, two in ((slow, fast, slow), (slow, noisy, fast), (fast, noisy, slow), (slow, slow, fast))
    ]
    # Of those as fast within noise, the most accurate.
    assert chosen == ["search-8-regions-1", "search-8-regions-1", "search-5-mse", "search-9-regions-2"]


def test_nothing_is_timed_where_all_that_is_inside_has_the_same_float_layers_or_nothing_is_inside():
    for outcomes in ({"corrected": 0.0, "mse": 0.001}, {"mse": 0.001, "regions-1": 0.01, "regions-2": 0.01}, {}):
        search, trials, _ = _search(outcomes, costly=COSTLY)
        assert trials_to_time(search, trials) == []


def test_training_and_layers_in_float_that_are_both_inside_are_timed():
    search, trials, _ = _search({"float-2": 0.0, "qat": 0.002})
    assert _names(trials_to_time(search, trials)) == ["float-2", "qat"]


def test_the_costliest_layers_of_the_best_free_setting_stay_float_more_and_more():
    _, trials, ranked = _search({"corrected": 0.01})
    assert _names(trials) == [*FREE, "float-1", "float-2", "float-4", "float-8", "qat"]
    assert set(ranked) == {"search-3-corrected"}
    assert trials[9].branch.float_layers == ("layer0", "layer1", "layer2", "layer3")
    assert trials[9].branch.equalizes
    assert isinstance(trials[-1].branch, QATRecipe)
    assert (trials[-1].branch.equalizes, trials[-1].branch.float_layers) == (True, ())


def test_training_is_tried_where_only_float_layers_are_inside_because_it_would_be_faster():
    search, trials, _ = _search({"float-2": 0.0})
    assert _names(trials) == [*FREE, "float-1", "float-2", "qat"]
    assert best_trial(search, trials).branch.name == "search-9-float-2"
    search, trials, _ = _search({"float-2": 0.0, "qat": 0.002})
    assert best_trial(search, trials).branch.name == "search-10-qat"


def test_where_none_is_inside_the_best_is_the_most_accurate():
    search, trials, _ = _search({"float-8": 0.02, "qat": 0.01})
    assert best_trial(search, trials).branch.name == "search-12-qat"


def test_the_limit_on_trials_ends_the_search():
    assert len(_search({}, max_trials=3)[1]) == 3


def test_a_drop_of_exactly_the_budget_is_inside():
    _, trials, _ = _search({"mse": 0.884 - 0.882}, max_top1_drop=0.002)
    assert _names(trials) == FREE


def test_training_asks_for_no_more_images_than_there_are():
    search = SearchRecipe()
    trials = [Trial(PTQRecipe(name=f"search-{n}-{name}", float_layers=()), 0.1, 1.0) for n, name in enumerate(FREE)]
    branch = next_trial(search, trials, lambda _: [], lambda _: [], 100)
    assert (branch.batch_size, branch.batches_per_epoch) == (30, 3)
    branch = next_trial(search, trials, lambda _: [], lambda _: [], 10)
    assert (branch.batch_size, branch.batches_per_epoch) == (10, 1)


@pytest.mark.parametrize(
    ("tables", "budget"),
    [
        ({"search": {}}, 0.002),
        ({"search": {"max_top1_drop": 0.005}}, 0.005),
        ({"search": {"max_top1_drop": 0.005}, "gate": {"confidence": 0.9}}, 0.005),
        ({"search": {}, "gate": {"max_top1_drop": 0.03}}, 0.03),
        ({"search": {"max_top1_drop": 0.03}, "gate": {"max_top1_drop": 0.03}}, 0.03),
    ],
)
def test_the_search_and_the_gate_have_one_budget(tables, budget):
    recipe = parse_recipe(RECIPE | tables)
    assert (recipe.search.max_top1_drop, recipe.gate.max_top1_drop) == (budget, budget)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_a_changed_budget_is_the_gates_too():
    recipe = parse_recipe(RECIPE | {"search": {"max_trials": 3}})
    changed = override_recipe(recipe, ["search.max_top1_drop=0.05"])
    assert (changed.search.max_top1_drop, changed.gate.max_top1_drop) == (0.05, 0.05)
    assert override_recipe(recipe, ["search.max_trials=4"]).gate.max_top1_drop == 0.002
    added = override_recipe(parse_recipe(RECIPE | {"ptq": [{"name": "p"}]}), ["search.max_trials=4"])
    assert (added.search.max_top1_drop, added.gate.max_top1_drop) == (0.002, 0.002)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, r"add a \[\[ptq\]\] or a \[\[qat\]\] branch, or \[search\]"),
        ({"search": {}, "ptq": [{"name": "search-1-minmax"}]}, "names that begin with 'search-'"),
        ({"search": {"max_trial": 3}}, "did you mean 'max_trials'"),
        ({"search": {"max_trials": 0}}, "search.max_trials = 0 is not allowed"),
        ({"search": {"max_minutes": 0}}, "search.max_minutes = 0 is not allowed"),
        ({"search": {"max_top1_drop": 2}}, "search.max_top1_drop = 2 is not allowed"),
        ({"search": {"max_top1_drop": 0.002}, "gate": {"max_top1_drop": 0.03}}, "are one budget: remove one of them"),
        ({"search": {}, "gate": {"max_top1_drop": 2}}, "gate.max_top1_drop = 2 is not allowed"),
        ({"search": 3}, "search = 3 is not allowed"),
    ],
)
def test_a_wrong_search_is_an_error(tables, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(RECIPE | tables)
