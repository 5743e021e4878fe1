"""A stage's key holds what decides its result, and nothing else."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import grimp
import pytest
from schemes import scheme

import quantlib
from quantlib.data.split import SplitInput, Subset
from quantlib.data.transforms import EvalTransform, TrainTransform
from quantlib.models.source import ModelInput
from quantlib.recipe.schedule import Schedule
from quantlib.store.artifacts import Ref
from tasks import data, export, measure, model, quantize
from tasks.stage import Stage, key_of, stage

STAGES = {
    value.name: value
    for module in (data, export, measure, model, quantize)
    for value in vars(module).values()
    if isinstance(value, Stage)
}
# Prints the code in every stage's key, for the quantlib that Python finds first.
PRINT_CODE = """
import functools, json, sys
from pathlib import Path
from quantlib.store import codehash
import quantlib
from tasks import data, export, measure, model, quantize
from tasks.stage import Stage
stages = {v.name: v for m in (data, export, measure, model, quantize) for v in vars(m).values() if isinstance(v, Stage)}
folder = Path(quantlib.__file__).parent
# What was not edited is parsed, hashed and searched for imports once, which takes minutes otherwise.
codehash.ast.parse, codehash.hash_tree = map(functools.cache, (codehash.ast.parse, codehash.hash_tree))
imported_modules = codehash.imported_modules
codehash.imported_modules = functools.cache(lambda *arguments: list(imported_modules(*arguments)))
def code():
    codehash.module_hashes.cache_clear()
    Stage._hash_code.cache_clear()
    return {name: stage._code() for name, stage in stages.items()}
found = {"": code()}
for edit, text in (("code", "edited = 1"), ("comment", "# edited")):
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        before = path.read_text()
        path.write_text(before + "\\n" + text + "\\n")
        found[f"{edit} {module}"] = code()
        path.write_text(before)
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def code_of_edits(tmp_path_factory):
    """The code in every stage's key: as it is, and with each module of quantlib edited."""
    copy = tmp_path_factory.mktemp("project")
    project = Path(quantlib.__file__).parents[1]
    for package in ("quantlib", "tasks", "flows"):
        shutil.copytree(project / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", PRINT_CODE],
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=True,
        cwd=copy,
    )
    return json.loads(done.stdout)


def modules_behind(stage, graph):
    """The modules that a stage's work imports, found by a different tool than the one under test."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(stage.work)))
    names = {
        f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in graph.modules else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = names | {m for name in names for m in graph.find_upstream_modules(name)}
    # Importing a module runs its parent packages.
    return found | {name.rsplit(".", n)[0] for name in found for n in range(name.count(".") + 1)}


def test_editing_a_module_changes_the_keys_of_exactly_the_stages_whose_work_imports_it(code_of_edits):
    graph = grimp.build_graph("quantlib", exclude_type_checking_imports=True, cache_dir=None)
    modules = sorted(name for name in graph.modules if name != "quantlib")
    assert len(modules) > 20
    for module in modules:
        after = code_of_edits[f"code {module}"]
        changed = {name for name in STAGES if after[name] != code_of_edits[""][name]}
        expected = {name for name, stage in STAGES.items() if module in modules_behind(stage, graph)}
        assert changed == expected, module


def test_editing_a_comment_changes_no_key(code_of_edits):
    edits = [edit for edit in code_of_edits if edit.startswith("comment ")]
    assert len(edits) > 20
    assert all(code_of_edits[edit] == code_of_edits[""] for edit in edits)


def test_decoding_images_depends_on_no_code_of_models_or_quantization(code_of_edits):
    modules = {name.removeprefix("code.") for name in code_of_edits[""]["decode"] if name.startswith("code.quantlib.")}
    packages = {name.split(".")[1] for name in modules}
    assert "data" in packages
    assert packages <= {"data", "errors", "imports", "progress"}


def _changed(code_of_edits, module):
    """The stages whose keys change with a module."""
    after, before = code_of_edits[f"code quantlib.{module}"], code_of_edits[""]
    return {name for name in STAGES if after[name] != before[name]}


def test_how_a_model_is_trained_is_in_no_key_of_a_file_an_evaluation_or_a_benchmark(code_of_edits):
    assert _changed(code_of_edits, "quantize.qat") == {"start_qat", "qat_epoch"}


def test_how_a_model_is_quantized_or_written_is_in_no_key_of_an_evaluation_of_its_file_or_a_benchmark(code_of_edits):
    measured = {"evaluate", "evaluate_baseline", "benchmark"}
    modules = [edit.removeprefix("code quantlib.") for edit in code_of_edits if edit.startswith("code ")]
    making = [name for name in modules if name.split(".")[0] in {"graph", "quantize", "export"} and "." in name]
    assert len(making) > 20
    assert [name for name in making if _changed(code_of_edits, name) & measured] == []


def test_how_files_are_written_is_in_no_key_of_what_leads_to_the_quantized_model(code_of_edits):
    written = {"script_and_save", "draft_onnx", "save_onnx", "save_program"}
    for module in (
        "scripting",
        "native",
        "torchscript",
        "archive",
        "onnx",
        "onnx_draft",
        "torch_export",
        "ends",
        "check",
    ):
        changed = _changed(code_of_edits, f"export.{module}")
        assert changed, module
        assert changed <= written, module


@pytest.mark.parametrize(
    "module", ["report.tables", "report.verdict", "store.journal", "store.retention", "recipe.schema"]
)
def test_what_only_reports_or_reads_the_recipe_is_in_no_key(module, code_of_edits):
    assert code_of_edits[f"code quantlib.{module}"] == code_of_edits[""]


def test_no_stage_computes_with_what_is_imported_at_the_top_of_its_file():
    allowed = {
        "quantlib.data.split",
        "quantlib.data.transforms",
        "quantlib.errors",
        "quantlib.models.source",
        "quantlib.recipe.interface",
        "quantlib.recipe.schedule",
        "quantlib.recipe.scheme",
        "quantlib.recipe.sections",
        "quantlib.runtimes.available",
        "quantlib.store.artifacts",
    }
    for module in (data, export, measure, model, quantize):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert {name for name in imported if name.startswith("quantlib")} <= allowed, module.__name__


REF = Ref("model", "a" * 64, 10)
SPLIT = SplitInput("imagefolder", "train", "/data", "f" * 64, 100, ("cat", "dog"))
SELECTION = Subset(SPLIT, 1, 0, 50)


def key(stage, *arguments, **named):
    return key_of(stage.ingredients(stage.bind(*arguments, **named)))


# Runs some stages on a shared store: each stores the name of its checkout, unless it finds a record.
SHARE_STAGES = """
import sys
from pathlib import Path
from quantlib.store.artifacts import Record
from quantlib.store.opening import open_store
from tasks import data, measure, quantize
from tasks.stage import key_of
store = open_store(Path(sys.argv[1]))
for stage in (data.decode, quantize.choose_ranges, quantize.calibrate, measure.evaluate):
    key = key_of(stage.ingredients({}))
    record = store.find_record(key)
    if record is None:
        made = store.put("model", sys.argv[1].encode())
        record = store.add_record(Record(key, stage.name, {}, (made,), 1.0, "2026-01-01T00:00:00+00:00"))
    print(stage.name, store.read(record.outputs[0]).decode())
"""


def test_two_checkouts_share_the_stages_whose_code_is_the_same_and_no_other(tmp_path):
    project = Path(quantlib.__file__).parents[1]
    (tmp_path / "shared").mkdir()
    found = []
    for name, edit in (("first", ""), ("second", "\nedited = 1\n"), ("third", "\n# edited\n")):
        for package in ("quantlib", "tasks"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(project / package, tmp_path / name / package, ignore=ignored)
        with (tmp_path / name / "quantlib" / "quantize" / "ranges.py").open("a") as file:
            file.write(edit)
        done = subprocess.run(
            [sys.executable, "-c", SHARE_STAGES, name],
            env={**os.environ, "PYTHONPATH": str(tmp_path / name), "QUANTFLOW_STORE": str(tmp_path / "shared")},
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path / name,
        )
        found.append(dict(line.split() for line in done.stdout.splitlines()))
    stages = ("decode", "choose_ranges", "calibrate", "evaluate")
    assert found[0] == dict.fromkeys(stages, "first")
    assert found[1] == found[0] | {"choose_ranges": "second", "calibrate": "second"}
    assert found[2] == found[0]


def test_what_decides_the_result_is_in_the_key():
    base = key(data.decode, SELECTION, EvalTransform(resize=64, crop=(64, 64)), 1, branch="x")
    others = [
        key(data.decode, replace(SELECTION, stop=40), EvalTransform(resize=64, crop=(64, 64)), 1, branch="x"),
        key(data.decode, replace(SELECTION, seed=2), EvalTransform(resize=64, crop=(64, 64)), 1, branch="x"),
        key(
            data.decode,
            replace(SELECTION, split=replace(SPLIT, fingerprint="e" * 64)),
            EvalTransform(resize=64, crop=(64, 64)),
            1,
            branch="x",
        ),
        key(data.decode, SELECTION, EvalTransform(resize=72, crop=(64, 64)), 1, branch="x"),
        key(data.decode, SELECTION, TrainTransform(crop=(64, 64), scale=(0.5, 1.0), flip=0.5), 1, branch="x"),
        key(data.decode, SELECTION, EvalTransform(resize=64, crop=(64, 64)), 2, branch="x"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_where_data_lies_and_what_a_run_is_called_are_not_in_the_key():
    base = key(data.decode, SELECTION, EvalTransform(resize=64, crop=(64, 64)), 1, branch="x")
    assert key(data.decode, SELECTION, EvalTransform(resize=64, crop=(64, 64)), 1, branch="y") == base
    assert (
        key(
            data.decode,
            replace(SELECTION, split=replace(SPLIT, root="/elsewhere")),
            EvalTransform(resize=64, crop=(64, 64)),
            1,
            branch="x",
        )
        == base
    )
    source = ModelInput("mobilenet_v2", "{}", "a.pth", "f" * 64, "")
    assert key(model.load_float, source, 10, (3, 64, 64), 1, None) == key(
        model.load_float, replace(source, weights="b.pth"), 10, (3, 64, 64), 1, None
    )
    assert key(model.load_float, replace(source, file="a.pt2"), 10, (3, 64, 64), 1, None) == key(
        model.load_float, replace(source, file="b.pt2"), 10, (3, 64, 64), 1, None
    )


def _fuse(job, model, mode, *, branch):
    return model


def _equalize(job, model, mode, *, branch):
    return model


def test_stages_of_equal_arguments_and_equal_code_have_different_keys_by_their_names():
    first, second = (stage("x")(work).ingredients({"model": REF, "mode": "eval"}) for work in (_fuse, _equalize))
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert differing == {"stage", "code._fuse", "code._equalize"}
    assert key_of({"stage": "_fuse"}) != key_of({"stage": "_equalize"})


def test_the_number_of_qat_epochs_is_not_in_an_epochs_key():
    schedule = Schedule(None, 30, None, 1e-4, "constant", 2, 3, 1)
    names = quantize.qat_epoch.ingredients(
        quantize.qat_epoch.bind(
            REF, 0, scheme("fbgemm"), schedule, SELECTION, EvalTransform(resize=64, crop=(64, 64)), None, branch="qat"
        )
    )
    assert names["schedule.epochs"] == "null"
    assert names["schedule.learning_rate"] == "0.0001"


def test_the_torch_version_is_in_every_key():
    for each in STAGES.values():
        assert "library.torch" in each.ingredients({})
