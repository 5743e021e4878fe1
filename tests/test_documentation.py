"""The documentation says what the code does: its snippets run, its commands exist, its reference is the schema's."""

import copy
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import duckdb
import harness
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from flows.cli.commands import main
from flows.parameters import packaged_recipes
from quantlib.data import datasets
from quantlib.export import folder, torch_export
from quantlib.models import registry
from quantlib.quantize import stored
from quantlib.recipe.schema import parse_recipe
from quantlib.store.local import Store

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
# In plain blocks stand output and maps of folders.
LANGUAGES = {"", "python", "sh", "sql", "toml", "nginx", "ini", "yaml"}
RECIPE = {"name": "fragment", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "ptq"}]}


def blocks_of(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def blocks(language):
    """Each page that has blocks in a language, and the blocks."""
    return [pytest.param(page, parts, id=page) for page in PAGES if (parts := blocks_of(page, language))]


def test_every_block_is_in_a_language_that_a_test_reads():
    for name, text in PAGES.items():
        fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
        assert len(fences) % 2 == 0, name
        assert set(fences[::2]) <= LANGUAGES, name


@pytest.mark.parametrize(("page", "parts"), blocks("toml"))
def test_every_recipe_and_every_part_of_one_is_allowed(page, parts):
    for part in parts:
        tables = tomllib.loads(part)
        parse_recipe(tables if {"name", "model", "data"} <= tables.keys() else RECIPE | tables)


def commands_of(text):
    """The command lines of quantflow in a block of shell, without what other programs they are joined with."""
    for line in text.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        words.whitespace_split = True
        first = []
        for word in words:
            if set(word) <= set("|&;"):
                break
            first.append(word)
        if first and Path(first[0]).name == "quantflow":
            yield first[1:]


def parse(arguments):
    """Parse a command line as quantflow does, without running it."""
    command, rest = main, list(arguments)
    while isinstance(command, click.Group):
        command = command.commands.get(rest.pop(0)) or pytest.fail(f"no such command: {arguments}")
    command.make_context(command.name, rest)


@pytest.mark.parametrize(("page", "parts"), blocks("sh"))
def test_every_command_is_one_that_quantflow_takes(page, parts, monkeypatch):
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: Path(value))  # The files are the reader's.
    for part in parts:
        for arguments in commands_of(part):
            parse(arguments)
        for target in re.findall(r"^make (\S+)", part, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_every_service_and_every_container_starts_what_there_is():
    manifests = [each for page in PAGES for part in blocks_of(page, "yaml") for each in yaml.safe_load_all(part)]
    pods = [each["spec"]["template"]["spec"] for each in manifests if each["kind"] == "Deployment"]
    commands = [container["command"] for pod in pods for container in pod["containers"]]
    units = "".join(part for page in PAGES for part in blocks_of(page, "ini"))
    commands += [shlex.split(line) for line in re.findall(r"^ExecStart=(.*)$", units, re.MULTILINE)]
    assert {Path(program).name for program, *_ in commands} == {"quantflow", "dask"}
    for program, *arguments in commands:
        if Path(program).name == "quantflow":
            parse(arguments)


def test_a_command_that_quantflow_does_not_take_is_noticed():
    assert list(commands_of("FOO=1\nquantflow run a.toml || curl x  # then\nbin/quantflow runs")) == [
        ["run", "a.toml"],
        ["runs"],
    ]
    for wrong in (["runn"], ["run", "--sett", "a=1"], ["cache", "verif"]):
        with pytest.raises((click.UsageError, pytest.fail.Exception)):
            parse(wrong)


def test_every_command_and_every_recipe_is_shown_somewhere():
    text = "\n".join(PAGES.values())
    assert [name for name in main.commands if f"quantflow {name}" not in text] == []
    assert [name for name in packaged_recipes() if name not in text] == []
    mentioned = set(re.findall(r"`quantflow ([a-z]+)", text))
    assert mentioned <= set(main.commands), mentioned - set(main.commands)


def anchors(text):
    """What links can point to in a page, as GitHub names headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


# Python


@pytest.fixture(scope="module")
def readers_folder(undisturbed, tmp_path_factory):
    """A folder as a reader of the pages has it: the files, and the names in their Python that no block defines."""
    pytest.importorskip("openvino", reason="the pages load models in OpenVINO")
    home, _ = undisturbed
    place = tmp_path_factory.mktemp("reader")
    run = harness.run_id_of(home)
    folder.export(home / "models", run, "per_channel", place / "flowers-int8")
    # The recipe of this run does not name torch_export.
    (line,) = (line for line in harness.newest_stage_lines(home) if line["label"] == "convert-per_channel")
    store = Store(home / "store")
    model, header = stored.open_model(store.read(store.find_record(line["key"]).outputs[0]))
    (place / "flowers-int8" / "per_channel.pt2").write_bytes(torch_export.write(model, header.input_shape))
    Image.new("RGB", (30, 20), "white").save(place / "photo.jpg")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    given = {"model": net, "images": torch.zeros(2, 3, 16, 16)}
    given |= {"float_model": copy.deepcopy(net), "batches": [torch.rand(4, 3, 16, 16)]}
    meant = {".quantflow": str(home), "RUN/VARIANT": f"{run}/per_channel", "VARIANT": "per_channel"}
    return place, given, meant


@pytest.fixture
def run_python(readers_folder, engine, monkeypatch):
    """Runs Python of a page as a reader would, in one namespace, which it returns."""
    place, given, meant = readers_folder
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.backends.quantized, "engine", torch.backends.quantized.engine)
    for name in ("openvino_telemetry", "predict"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")

    def run(parts):
        namespace = dict(given)
        for part in parts:
            code = part
            for written, real in (meant | {'"x86"': repr(engine)}).items():
                code = code.replace(written, real)
            if file := re.match(r"# (\w+\.py)\n", code):
                (place / file[1]).write_text(code)
            exec(code, namespace)
        return namespace

    return run


@pytest.mark.parametrize(("page", "parts"), blocks("python"))
def test_the_python_of_every_page_runs_as_written(page, parts, run_python):
    run_python(parts)


def test_the_python_api_answers_and_writes_a_file(run_python, readers_folder):
    names = run_python(blocks_of("docs/own-model.md", "python"))
    assert names["answers"].shape == (2, 10)
    assert {"model.onnx", "model.pt2", "my_net.py"} <= {path.name for path in readers_folder[0].iterdir()}


def test_all_ways_to_run_a_bundle_give_the_same_class(run_python):
    parts = blocks_of("docs/deploying.md", "python")
    answers = [run_python(parts[:number])["logits"] for number in range(1, len(parts) + 1)]
    assert len(answers) == 6
    assert {int(torch.as_tensor(each).argmax()) for each in answers} == {int(answers[0].argmax())}


def test_the_model_and_the_dataset_of_the_pages_can_be_named_in_a_recipe(run_python, readers_folder):
    for page in ("docs/own-model.md", "docs/own-data.md"):
        run_python(blocks_of(page, "python"))
    sys.path.append(str(readers_folder[0]))
    net = registry.build("my_net:build", {"num_classes": 2, "width": 32})
    registry.check_logits(net, 2, (3, 16, 16))
    split = datasets.open_split("my_data:open_split", None, "val")
    assert (len(split), split.classes) == (200, ("dark", "light"))
    assert split.open(1).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("page", "parts"), blocks("sql"))
def test_the_sql_of_every_page_runs_as_written(page, parts, undisturbed):
    for part in parts:
        assert len(duckdb.sql(part.replace(".quantflow", str(undisturbed[0]))).fetchall()) == 1


def test_the_script_in_the_bundle_runs_as_the_page_says(readers_folder):
    place, _, _ = readers_folder
    (line,) = (line for line in PAGES["docs/deploying.md"].splitlines() if line.startswith("python "))
    command = [sys.executable, *shlex.split(line, comments=True)[1:]]
    done = subprocess.run(command, cwd=place, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("photo.jpg\n")


# Reference


@pytest.fixture(scope="module")
def reference():
    """The script that writes the reference pages."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["recipe.md", "report.md"])
def test_the_reference_pages_are_what_the_schema_gives(name, reference):
    assert PAGES[f"docs/{name}"] == reference.pages()[name] + "\n", "write them again with `make docs`"


def test_a_column_or_key_without_a_description_is_an_error(reference):
    @dataclass
    class Row:
        told: int
        """Described."""
        untold: int

    with pytest.raises(ValueError, match=r"Row\.untold has no docstring: add one below it"):
        reference._docstrings(Row)
    with pytest.raises(ValueError, match="'untold' has no docstring"):
        reference._described({"type": "integer"}, "untold")
