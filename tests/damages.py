"""Every kind of file of a home, damaged in every way and read by every command."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from attack import Findings, command, compare, finish, new_folder, said, undisturbed
from click.testing import CliRunner, Result
from dashboard_driver import until

from flows.cli.commands import main
from quantlib import api

_HANG_SECONDS = 60
# Commands that show figures must show the right ones, or say that they cannot.
_SHOWS_FIGURES = ("report", "report --intervals", "report --html page.html", "report --json")
# One in this many damaged files is also read by a run, which takes seconds.
_RUN_EVERY = 40


def _overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def _instead(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def _flip_a_bit(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"x")
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    _overwrite(path, bytes(content))


def _cut(path: Path, dice: random.Random) -> None:
    content = path.read_bytes()
    _overwrite(path, content[: dice.randrange(len(content) + 1)])


def _put_noise(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = dice.randrange(len(content) + 1)
    content[start : start + 64] = dice.randbytes(64)
    _overwrite(path, bytes(content))


def _another_type(path: Path, dice: random.Random) -> None:
    """Another value somewhere in JSON; noise in any other file."""
    lines = path.read_bytes().splitlines() if path.suffix in {".json", ".jsonl"} else []
    if not lines:
        _put_noise(path, dice)
        return
    number = dice.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        value = None
    other = dice.choice([None, -1, 10**30, "\ud800", "[red]x", [], {}, True, 1e308, "../../etc", "2026-99-99"])
    if isinstance(value, dict) and value:
        value[dice.choice(list(value))] = other
    else:
        value = other
    lines[number] = json.dumps(value).encode()
    _overwrite(path, b"\n".join(lines) + b"\n")


def _forbid(path: Path, _: random.Random) -> None:
    path.chmod(0o000)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit flipped": _flip_a_bit,
    "cut": _cut,
    "noise": _put_noise,
    "another type": _another_type,
    "emptied": lambda path, _: _overwrite(path, b""),
    "longer": lambda path, dice: _overwrite(path, path.read_bytes() + dice.randbytes(100)),
    "deleted": lambda path, _: path.unlink(),
    "a named pipe": lambda path, _: _instead(path, os.mkfifo),
    "a folder": lambda path, _: _instead(path, Path.mkdir),
    "a link to nowhere": lambda path, _: _instead(path, lambda place: place.symlink_to("nowhere")),
    "a link to itself": lambda path, _: _instead(path, lambda place: place.symlink_to(place.name)),
    "unreadable": _forbid,
}


def damage_files(place: Path, number: int, seed: int) -> list[Findings]:
    """Damage `number` files of a home, one at a time, and read the home with every command."""
    dice = random.Random(seed)
    expected = undisturbed(place, "damages")
    folder = place / "damages"
    home = folder / "home"
    # A killed run, so that there is something to resume.
    killed = command(folder, "run", "tiny.toml", "--set", "seed=7")
    until(lambda: len(harness.newest_stage_lines(home)) >= 4, 120, lambda: said(folder))
    killed.kill()
    killed.wait()
    files = _files(home)
    findings = {kind: Findings(f"damage: {kind}") for kind in DAMAGES}
    reader = _Reader(folder)
    for attempt in range(number):
        kind = list(DAMAGES)[attempt % len(DAMAGES)]
        path = dice.choice(files[dice.choice(list(files))])
        what = f"{path.relative_to(home)} {kind} (number {attempt}, seed {seed})"
        findings[kind].attempts += 1
        with _restored(path):
            DAMAGES[kind](path, dice)
            reader.read(path, findings[kind], what)
            if attempt % _RUN_EVERY == 0:
                copy = new_folder(place, f"damaged-{attempt}")
                # Copies named pipes and links as they are.
                subprocess.run(["cp", "-a", str(home), str(copy / "home")], check=True)
                status = finish(command(copy, "run", "tiny.toml"), copy, findings[kind], what)
                if status in {0, 3}:
                    compare(copy / "home", expected, findings[kind], what, repaired=True)
                elif status is not None and str(path.name) not in said(copy):
                    findings[kind].add("status", f"{what}: {said(copy)[-500:]}")
                shutil.rmtree(copy)
    reader.close()
    return list(findings.values())


def _files(home: Path) -> dict[str, list[Path]]:
    """Files by kind, without Prefect's own."""
    found: dict[str, list[Path]] = {}
    for path in sorted(home.rglob("*")):
        kind = path.relative_to(home).parts[0]
        if path.is_file() and not path.is_symlink() and kind != "prefect":
            found.setdefault(f"{kind}{path.suffix}", []).append(path)
    return found


@contextlib.contextmanager
def _restored(path: Path) -> Iterator[None]:
    content, mode = path.read_bytes(), path.stat().st_mode
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        elif path.is_symlink() or path.exists():
            path.unlink()
        path.write_bytes(content)
        path.chmod(mode)


class _Reader:
    """Reads a home with every command, and knows what each prints for the undamaged home."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._helper = ProcessPoolExecutor(1)
        newest = harness.run_id_of(folder / "home")
        completed = next(path.name for path in sorted((folder / "home" / "models").iterdir()))
        self._commands = {
            "runs": ["runs"],
            "runs RUN": ["runs", newest],
            "report": ["report"],
            "report --intervals": ["report", "--intervals"],
            "report --html page.html": ["report", "--html", str(folder / "page.html"), completed],
            "report --json": ["report", completed, "--json"],
            "compare": ["compare", completed, completed],
            "cache list": ["cache", "list"],
            "cache verify": ["cache", "verify"],
            "plan": ["plan", str(folder / "tiny.toml")],
        }
        self._right = {name: self._shown(name, self._run(command)) for name, command in self._commands.items()}
        self._answers: dict[Path, list[list[float]]] = {}
        for path in (folder / "home" / "models").rglob("*.*"):
            if path.suffix in {".pt", ".onnx"}:
                self._answers[path] = self._helper.submit(_answers, str(path)).result()

    def close(self) -> None:
        self._helper.shutdown()

    def read(self, path: Path, findings: Findings, what: str) -> None:
        """Run each command once, and load the damaged file if it is a model."""
        for name, arguments in self._commands.items():
            result = self._run(arguments)
            if result is None:
                findings.add("hang", f"{what}: {name}")
                continue
            if "bug in quantflow" in result.output or "Traceback" in result.output or _is_raw(result):
                findings.add("traceback", f"{what}: {name}: {result.output[-600:]} {result.exception!r}")
            if name in _SHOWS_FIGURES and result.exit_code == 0 and self._shown(name, result) != self._right[name]:
                findings.add("silent", f"{what}: {name}: {result.output[-600:]}")
        if path in self._answers:
            self._load(path, findings, what)

    def _load(self, path: Path, findings: Findings, what: str) -> None:
        try:
            answers = self._helper.submit(_answers, str(path)).result()
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "quantlib":
                findings.add("traceback", f"{what}: api.load: {type(error).__name__}: {str(error)[:300]}")
            return
        if answers != self._answers[path]:
            findings.add("silent", f"{what}: api.load gives a model that answers otherwise")

    def _run(self, arguments: list[str]) -> Result | None:
        """Result of a command; None if it hangs."""

        def ring(*_: object) -> None:
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, ring)
        signal.alarm(_HANG_SECONDS)
        try:
            result = CliRunner().invoke(main, [*arguments, "--home", str(self._folder / "home")])
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        return None if isinstance(result.exception, TimeoutError) or "TimeoutError" in result.output else result

    def _shown(self, name: str, result: Result | None) -> str:
        assert result is not None
        return (self._folder / "page.html").read_text() if "html" in name else result.output


def _is_raw(result: Result) -> bool:
    return result.exception is not None and not isinstance(result.exception, SystemExit)


def _answers(path: str) -> list[list[float]]:
    """A shipped model's logits for an image."""
    model = api.load(Path(path))
    image = np.linspace(-1, 1, 3 * 16 * 16, dtype=np.float32).reshape(1, 3, 16, 16)
    answers: list[list[float]] = model(torch.from_numpy(image)).tolist()
    return answers
