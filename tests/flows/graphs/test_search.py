"""The search as a run: its trials are branches like any other, and a killed search is resumed."""

import hashlib
import re
import shutil
from types import SimpleNamespace

import harness
import pandas as pd
import pytest

from flows.graphs import search as flow
from flows.graphs.planning import plan_run
from quantlib.data.split import Subset
from quantlib.data.transforms import EvalTransform
from quantlib.inputs import Inputs
from quantlib.recipe.schema import parse_recipe
from quantlib.recipe.sections import SearchRecipe
from quantlib.recipe.variant import Variant
from quantlib.runtimes import available
from quantlib.runtimes.available import Runtime
from quantlib.search import Trial
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.refs import FileRefs, VariantRefs
from tasks.run import NotYetKnownError

BRANCHES = {"ptq", "qat"}
RECIPE = {key: value for key, value in harness.RECIPE.items() if key not in BRANCHES}
RECIPE |= {"search": {"max_trials": 2, "max_top1_drop": 0.0}, "gate": {}}
RECIPE |= {"evaluation": RECIPE["evaluation"] | {"layers": True}}
TRIALS = ["search-1-minmax", "search-2-equalized"]


@pytest.fixture(scope="module")
def searched(prefect_server, tmp_path_factory):
    """The home of a search of two trials that was killed in the second, then resumed."""
    home = tmp_path_factory.mktemp("search") / "home"
    killed = harness.start_run(home, recipe=RECIPE, hold_at="before convert-search-2-equalized")
    while not killed.held.exists():
        assert killed.is_alive()
        killed.join(0.05)
    saved = (home / "models" / harness.run_id_of(home) / "search-best.pt").read_bytes()
    killed.kill()
    killed.join()
    outcome = harness.run(home, recipe=RECIPE, run_id=harness.run_id_of(home))
    assert outcome.error == ""
    return home, outcome, saved


def test_trials_are_variants_of_the_report(searched):
    home, _, _ = searched
    variants = pd.read_parquet(home / "reports" / "variants").set_index("variant")
    assert list(variants.index) == ["float", *TRIALS]
    assert list(variants.equalized) == [False, False, True]
    assert variants.winner.sum() == (variants.gate[TRIALS] == "inside").any()


def test_the_best_so_far_is_saved_at_every_step(searched):
    home, _, saved = searched
    files = pd.read_parquet(home / "reports" / "files")
    hashes = files[files.runtime.str.startswith("torchscript")].set_index("variant").sha256
    assert hashlib.sha256(saved).hexdigest() == hashes["search-1-minmax"]
    variants = pd.read_parquet(home / "reports" / "variants").set_index("variant")
    best = variants.loc[TRIALS].top1_selection.idxmax()  # The first among equals.
    content = (home / "models" / harness.run_id_of(home) / "search-best.pt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == hashes[best]


def test_a_killed_search_is_resumed_where_it_stopped(searched):
    _, outcome, _ = searched
    assert outcome.stages["evaluate-search-1-minmax-held_out"]
    assert not outcome.stages["convert-search-2-equalized"]


@pytest.mark.slow
def test_a_search_whose_trials_run_at_once_ends_with_the_same(searched, tmp_path):
    home, _, _ = searched
    outcome = harness.run(tmp_path / "home", recipe=RECIPE, at_once=True)
    assert outcome.error == ""
    made, wanted = harness.outputs_of(tmp_path / "home"), harness.outputs_of(home)
    assert made == wanted


def test_a_plan_follows_the_trials_that_were_made(searched, equally_fast):
    home, outcome, _ = searched
    planned = plan_run(parse_recipe(RECIPE), home)
    assert {stage.label for stage in planned} == set(outcome.stages)
    assert all(stage.reused for stage in planned)


def test_a_plan_of_a_new_search_ends_with_its_first_trial(tmp_path):
    labels = [stage.label for stage in plan_run(parse_recipe(RECIPE), tmp_path)]
    assert "evaluate-search-1-minmax-held_out" in labels
    assert not any("search-2" in label for label in labels)


def test_the_time_that_reused_stages_once_took_counts(searched, tmp_path):
    home, outcome, _ = searched
    records = {record.key: record.seconds for record in Store(home / "store").records()}
    # What is evaluated after the timing is not part of the search.
    after = re.compile("evaluate-.*-(torchscript-[a-z0-9]+|onnxruntime|openvino)(-held_out)?")
    searching = {label: key for label, key in harness.keys_done(home).items() if not after.fullmatch(label)}
    seconds = sum(records[key] for label, key in searching.items() if "search-1" in label)
    recipe = RECIPE | {"search": RECIPE["search"] | {"max_minutes": 0.9 * seconds / 60}}
    assert not any("search-2" in stage.label for stage in plan_run(parse_recipe(recipe), home))
    copied = shutil.copytree(home, tmp_path / "home")
    stages = harness.run(copied, recipe=recipe).stages
    assert all(stages[label] for label in outcome.stages if "search-1" in label)
    assert not any("search-2" in label for label in stages)


def test_every_layer_of_every_variant_is_in_the_table_of_layers(searched):
    home, _, _ = searched
    layers = pd.read_parquet(home / "reports" / "layers")
    assert set(layers.variant) == set(TRIALS)
    assert not layers.duplicated(["variant", "layer"]).any()
    assert set(layers.num_images) == {40}
    assert set(layers.measured_on) == {"held_out"}


# The loop alone


COSTLY = (("a",), ("a", "b"))
FREE = ["minmax", "equalized", "corrected", "per_channel", "mse", "smoothed", "percentile"]
X86, ONEDNN = "torchscript-x86", "torchscript-onednn"


class FakeRun:
    """The run of a search whose trials have a drop, and perhaps times, by the end of their names."""

    store = None
    machine = available.this_machine()

    def __init__(self, drops, keys, runtime, costly, times, at_once):
        self.drops, self._keys, self.runtime, self.costly, self.times = drops, keys, runtime, costly, times
        self.at_once, self.made = at_once, []
        self.saved, self.ranked, self.timed = [], [], []

    def begin(self, call):
        result = call()
        return lambda: result

    @property
    def keys(self):
        return self._keys()

    def known(self, refs):
        if self.times is None:
            raise NotYetKnownError

    def copy_out(self, ref, name):
        assert name == f"search-best{self.runtime.suffix}"
        self.saved.append(ref.sha256)

    def branch(self, shared, branch):
        self.made.append(branch.name)
        file = Ref("file", branch.name, 1)
        return VariantRefs(
            variant=Variant(name=branch.name, method="", engine="x86"),
            plan=Ref("plan", branch.name, 1),
            engines=((Runtime(ONEDNN, "1"), file),),
            reference=FileRefs(file=file, runtime=self.runtime),
            saved=((self.runtime, file),),
            model=Ref("int8-model", branch.name, 1),
        )

    def evaluate_selection(self, shared, name, file):
        assert name == file.file.sha256
        return file

    def layers_of(self, shared, model, branch):
        assert model == Ref("int8-model", branch.name, 1)
        self.ranked.append(branch.name)
        return (Ref("layers", branch.name, 1),)

    def rank_layers(self, run, parts):
        return [f"layer{n}" for n in range(9)]

    def costly_layers(self, run, plan):
        assert plan.kind == "plan"
        return self.costly

    def judge(self, run, branch, baseline, variant):
        drop = self.drops.get(branch.name.split("-", 2)[2], 0.1)
        if drop is None:
            raise NotYetKnownError
        return Trial(branch, abs(drop), 1.0 if drop >= 0 else 0.0)

    def time_files(self, shared, targets, batch_sizes, num_threads, name):
        assert (batch_sizes, num_threads, name) == ((1,), (1,), "search")
        self.timed.append([(target.artifact.sha256, target.runtime.name) for target in targets])
        return Ref("timings", "t", 1)

    def read_samples(self, store, targets, timings):
        found = {}
        for each in targets:
            ms = self.times[each.artifact.sha256.split("-", 2)[2]][each.runtime.name]
            found.setdefault(each.artifact, {})[each.runtime.name, 1, 1] = [ms] * 9
        return found


@pytest.fixture
def loop(monkeypatch):
    """Runs the loop; returns its variants, its note, and what it saved, measured and timed."""
    monkeypatch.setattr(flow, "seconds_of", lambda store, keys: 0.0)

    def run(drops, keys=list, runtime=X86, costly=(), times=None, allowed=lambda _: True, at_once=None, **settings):
        fake = FakeRun(drops, keys, Runtime(runtime, "1"), costly, times, at_once is not None)
        images = Subset(None, 0, 0, 1000)
        for name in (
            "evaluate_selection",
            "layers_of",
            "rank_layers",
            "costly_layers",
            "judge",
            "time_files",
            "read_samples",
        ):
            monkeypatch.setattr(flow, name, getattr(fake, name))
        monkeypatch.setattr(flow, "ptq_branch", fake.branch)
        monkeypatch.setattr(flow, "qat_branch", fake.branch)
        shared = SimpleNamespace(
            run=fake,
            recipe=SimpleNamespace(search=SearchRecipe(**settings)),
            may_ship=allowed,
            inputs=Inputs(None, EvalTransform(resize=32, crop=(32, 32)), None, None, images, images, images),
        )
        variants, best, note = flow.search_branches(shared, fake.branch(shared, SimpleNamespace(name="float")))
        assert best is None or f"{best}, " in note
        if at_once is not None:
            at_once += fake.made[1:]  # The first is float.
        return variants, note, fake.saved, fake.ranked, fake.timed

    return run


def test_the_file_that_is_saved_is_always_the_best_so_far(loop):
    _, _, saved, *_ = loop({"equalized": 0.05, "corrected": 0.06, "float-1": 0.0, "qat": 0.2})
    assert [name.split("-", 2)[2] for name in saved] == ["minmax", *["equalized"] * 6, "float-1", "float-1"]


@pytest.mark.parametrize(("drops", "num_tried"), [({"corrected": 0.05}, 12), ({"minmax": -1e-9}, 1), ({}, 12)])
def test_trials_that_are_begun_together_are_judged_as_if_they_came_one_after_the_other(loop, drops, num_tried):
    begun = []
    expected, found = loop(drops), loop(drops, at_once=begun)
    assert found == expected
    assert len(found[0]) == num_tried
    assert [name.split("-", 2)[2] for name in begun[:7]] == FREE
    assert len(begun) == max(7, num_tried)
    assert len(set(begun)) == len(begun)


def test_of_a_model_without_a_torchscript_file_the_onnx_file_is_saved(loop):
    assert loop({}, runtime="openvino", max_trials=1)[2] == ["search-1-minmax"]


def test_the_layers_of_the_trial_that_is_refined_are_measured_once_and_reported(loop):
    variants, _, _, ranked, _ = loop({"corrected": 0.05})
    assert ranked == ["search-3-corrected"]
    assert [variant.variant.name for variant in variants if variant.layers] == ["search-3-corrected"]


def test_a_budget_that_cannot_be_met_says_by_how_much_it_is_missed(loop):
    _, note, *_ = loop({"mse": 0.005})
    assert "12 trials 0.30 points outside its budget of 0.20; its best is search-5-mse, -0.50 points" in note


def test_a_budget_that_is_met_says_by_which_trial(loop):
    assert "7 trials inside its budget: search-5-mse, -0.10 points" in loop({"mse": 0.001})[1]


def test_no_trial_begins_when_the_time_is_over(loop, monkeypatch):
    met = iter([{"shared"}, {"shared"}, {"shared", "a"}, {"shared", "a", "b"}])
    monkeypatch.setattr(
        flow, "seconds_of", lambda store, keys: sum({"shared": 600.0, "a": 59.0, "b": 1.0}[k] for k in keys)
    )
    variants, note, *_ = loop({}, keys=lambda: next(met), max_minutes=1.0)
    assert len(variants) == 2
    assert "after 2 trials, at its limit of 1 minute," in note


def test_one_trial_is_one_trial(loop):
    assert "after 1 trial, at its limit, 9.80 points outside" in loop({}, max_trials=1)[1]


def test_a_run_that_is_only_planned_ends_where_it_cannot_know(loop):
    variants, _, saved, *_ = loop({"corrected": None})
    assert [variant.variant.name for variant in variants][-1] == "search-3-corrected"
    assert len(saved) == 2


def test_regions_in_float_are_timed_with_the_best_free_setting_in_one_stage_and_the_fastest_is_saved(loop):
    times = {"mse": {X86: 2.0, ONEDNN: 3.0}, "regions-1": {X86: 4.0, ONEDNN: 1.5}, "regions-2": {X86: 1.7, ONEDNN: 4.0}}
    drops = {"mse": 0.0, "regions-1": 0.001, "regions-2": 0.001}
    _, note, saved, _, timed = loop(drops, costly=COSTLY, times=times)
    files = ["search-5-mse", "search-8-regions-1", "search-9-regions-2"]
    assert timed == [[(file, runtime) for file in files for runtime in (X86, ONEDNN)]]
    assert "9 trials inside its budget: search-8-regions-1, -0.10 points on the selection images, 1.5 ms per" in note
    assert saved[-2:] == ["search-5-mse", "search-8-regions-1"]


def test_only_runtimes_that_the_gate_allows_are_timed(loop):
    drops = {"mse": 0.0, "regions-1": 0.001}
    _, note, _, _, timed = loop(drops, costly=COSTLY, allowed=lambda runtime: runtime.kind == "onnxruntime")
    assert timed == []
    assert "search-5-mse" in note


def test_a_plan_that_does_not_know_the_times_ends_with_the_stage_that_takes_them(loop):
    variants, note, saved, _, timed = loop({"mse": 0.0, "regions-1": 0.001}, costly=COSTLY)
    assert len(timed) == 1
    assert len(variants) == 9
    assert saved[-1] == "search-5-mse"
    assert "ms per image" not in note
