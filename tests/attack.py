"""Attack the installed quantflow through its command line, and count what it does not survive.

    python tests/attack.py --kills 300 --damages 2000

Runs are killed, stopped and interrupted at random times in every way, then resumed; the store is freed during a run;
dashboards come, go, and compete for a home; a disk fills up; a week of the schedule passes with power cuts; every kind
of file is damaged in every way and read by every command (damages.py). What a run computes must stay the same to the
bit, no stage may be computed twice, nothing may hang, and no traceback may be shown. Ends with a table, and with exit
status 1 if anything was found. `faults/test_attack.py` does the same with small numbers.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import harness
from dashboard_driver import TINY, Dashboard, find_processes, own_environment, until

from flows.hosting.processes import is_alive
from quantlib.report import tables
from quantlib.store.artifacts import Ref
from quantlib.store.journal import read_runs
from quantlib.store.local import Store
from quantlib.store.retention import find_damage

_HANG_SECONDS = 300
_RUN_SECONDS = 14.0
# How a run may exit, whatever was done to it: completed, without a winner, an error with a message, interrupted.
_ORDERLY = {0, 1, 2, 3, 130}


@dataclass
class Findings:
    """What one kind of attack found."""

    attack: str
    attempts: int = 0
    found: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, what: str, example: str) -> None:
        """Note one thing that must not happen."""
        self.found[what] += 1
        self.examples.append(f"{self.attack}, {what}: {example}")


Figures = dict[tuple[str, str], tuple[float, int]]


@dataclass(frozen=True)
class Expected:
    """The results of an undisturbed run."""

    outputs: dict[str, tuple[Ref, ...]]
    figures: Figures
    """(top-1, bytes) by variant and runtime."""


def figures_of(home: Path) -> Figures:
    """Figures of every run of a home; which runtime is fastest is chance, but what a file answers in it is not."""
    rows = [row for _, row in tables.read_variants(home / "reports", lambda _: None)]
    return {(row.variant, row.runtime): (row.top1, row.size_bytes) for row in rows}


def command(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a `quantflow` command in its own session; its output goes to a file that `said` reads."""
    with (folder / "said").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli.commands", *arguments, "--home", "home"],
            cwd=folder,
            env=own_environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def said(folder: Path) -> str:
    """Output of the last command in a folder."""
    return (folder / "said").read_text(errors="replace")


def finish(process: "subprocess.Popen[str]", folder: Path, findings: Findings, what: str) -> int | None:
    """Wait for a command to end, and check its output. Its exit status, or None if it hung."""
    try:
        status = process.wait(_HANG_SECONDS)
    except subprocess.TimeoutExpired:
        findings.add("hang", f"{what} in {folder}: {said(folder)[-500:]}")
        _kill_all(process)
        return None
    if "Traceback (most recent call last)" in said(folder) or "bug in quantflow" in said(folder):
        findings.add("traceback", f"{what} in {folder}: {said(folder)[-1500:]}")
    return status


def compare(home: Path, expected: Expected, findings: Findings, what: str, *, repaired: bool = False) -> None:
    """Note every figure, artifact and stage that differs from an undisturbed run.

    Args:
        home: Home of the runs.
        expected: The results of an undisturbed run.
        findings: Collects the differences.
        what: What was done to the runs.
        repaired: Whether a stage's output was damaged afterwards, so that the stage was computed again.
    """
    compare_outputs(home, expected, findings, what)
    for file, figures in figures_of(home).items():
        if expected.figures.get(file, figures) != figures:
            findings.add("different", f"{what} in {home}: {file} has {figures}, not {expected.figures[file]}")
    compare_stages(home, findings, what, most=1 + repaired)
    if find_damage(Store(home / "store"))[1]:
        findings.add("damage", f"{what} in {home}: the store is damaged")


def compare_outputs(home: Path, expected: Expected, findings: Findings, what: str) -> None:
    """Note every artifact whose bytes differ from an undisturbed run's."""
    outputs = harness.outputs_of(home)
    for key in outputs.keys() & expected.outputs.keys():
        if outputs[key] != expected.outputs[key]:
            findings.add("different", f"{what} in {home}: stage {key}")


def compare_stages(home: Path, findings: Findings, what: str, most: int = 1) -> None:
    """Note every stage that was computed more often than `most`."""
    computed = Counter(line["key"] for line in harness.stage_lines(home) if line.get("cached") is False)
    for key, count in computed.items():
        if count > most:
            findings.add("twice", f"{what} in {home}: stage {key} was computed {count} times")


def new_folder(place: Path, name: str) -> Path:
    """A new folder with the recipe in it."""
    folder = place / name
    folder.mkdir()
    (folder / "tiny.toml").write_text(TINY.replace("epochs = 1\nbatches", "epochs = 3\nbatches"))
    return folder


def undisturbed(place: Path, name: str = "undisturbed") -> Expected:
    """The results of an undisturbed run, which stays in a folder of that name."""
    folder = new_folder(place, name)
    assert command(folder, "run", "tiny.toml").wait(_HANG_SECONDS) in {0, 3}, said(folder)
    return Expected(harness.outputs_of(folder / "home"), figures_of(folder / "home"))


# Kills.


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill_all(process: "subprocess.Popen[str]") -> None:
    _send(find_processes(process.pid), signal.SIGKILL)
    process.wait()


def _stop_and_continue(process: "subprocess.Popen[str]", dice: random.Random) -> None:
    pids = find_processes(process.pid)
    _send(pids, signal.SIGSTOP)
    time.sleep(dice.uniform(0.5, 3.0))
    _send(pids, signal.SIGCONT)


FAULTS: dict[str, tuple[Callable[["subprocess.Popen[str]", random.Random], None], bool]] = {
    # What is done; whether the run should continue as if nothing had happened.
    "the flow": (lambda process, _: process.kill(), False),
    "all processes": (lambda process, _: _kill_all(process), False),
    "the server": (lambda process, _: _send(find_processes(process.pid, "flows.hosting.server"), signal.SIGKILL), True),
    "SIGTERM": (lambda process, _: process.terminate(), False),
    "Ctrl-C": (lambda process, _: os.killpg(process.pid, signal.SIGINT), False),
    "stop and continue": (_stop_and_continue, True),
}


def kill(folder: Path, number: int, seed: int, expected: Expected, findings: dict[str, Findings]) -> None:
    """Kill runs of a home, one after the other; each continues from what the last one left, until one completes."""
    dice = random.Random(seed)
    home = folder / "home"
    for _ in range(number):
        name = dice.choice(list(FAULTS))
        inflict, goes_on = FAULTS[name]
        found = findings[name]
        unfinished = any(run.state in {"crashed", "failed"} for run in read_runs(home / "runs"))
        process = command(folder, *(["resume"] if unfinished and dice.random() < 0.5 else ["run", "tiny.toml"]))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(dice.uniform(0.2, _RUN_SECONDS))
        hit = process.poll() is None
        started = find_processes(process.pid) if hit else []
        if hit:
            found.attempts += 1
            inflict(process, dice)
        status = finish(process, folder, found, name)
        if status is None:
            continue
        if status not in _ORDERLY | {-signal.SIGKILL, -signal.SIGTERM}:
            found.add("status", f"{name} in {folder}: exit status {status}: {said(folder)[-500:]}")
        if goes_on and status not in {0, 3}:
            found.add("status", f"{name} in {folder}: the run ended with {status}: {said(folder)[-500:]}")
        deadline = time.monotonic() + 20
        while (left := [pid for pid in started if is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            found.add("left", f"{name} in {folder}: processes {left} outlived the run")
        if status in {0, 3}:
            compare(home, expected, found, name)
            shutil.rmtree(home)
    if home.exists():
        if finish(command(folder, "run", "tiny.toml"), folder, found, "the last run") not in {0, 3}:
            found.add("status", f"the last run in {folder}: {said(folder)[-500:]}")
        compare(home, expected, found, "the last run")


def kills(place: Path, number: int, seed: int, expected: Expected, jobs: int) -> list[Findings]:
    """`number` kills in total, spread over homes side by side."""
    findings = [{name: Findings(f"kill: {name}") for name in FAULTS} for _ in range(jobs)]
    folders = [new_folder(place, f"kills-{job}") for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        for future in [
            pool.submit(kill, folder, number // jobs, seed + job, expected, findings[job])
            for job, folder in enumerate(folders)
        ]:
            future.result()
    merged = [Findings(f"kill: {name}") for name in FAULTS]
    for one in merged:
        for found in findings:
            part = found[one.attack.removeprefix("kill: ")]
            one.attempts += part.attempts
            one.found += part.found
            one.examples += part.examples
    return merged


# A store that is freed during its runs.


def free_while_computing(place: Path, number: int, seed: int, expected: Expected) -> Findings:
    """Run `cache free` on everything, at random times during a run."""
    findings, dice = Findings("cache free while a run computes"), random.Random(seed)
    for attempt in range(number):
        folder = new_folder(place, f"free-{attempt}")
        (folder / "free").mkdir()
        (folder / "free" / "home").symlink_to(folder / "home")
        process = command(folder, "run", "tiny.toml")
        while process.poll() is None:
            time.sleep(dice.uniform(0.5, 3.0))
            freeing = command(folder / "free", "cache", "free", "--unused-for", "0")
            findings.attempts += 1
            if finish(freeing, folder / "free", findings, "cache free") not in {0, 2}:
                findings.add("status", f"cache free in {folder}: {said(folder / 'free')}")
        if finish(process, folder, findings, "the run") not in {0, 3}:
            findings.add("status", f"the run in {folder}: {said(folder)[-500:]}")
        compare(folder / "home", expected, findings, "freed under the run")
    return findings


# Dashboards.


def dashboards(place: Path, number: int, seed: int, expected: Expected) -> Findings:
    """Two dashboards on one home, and a dashboard that is started, stopped and killed while other runs continue."""
    findings, dice = Findings("dashboards that come, go and meet"), random.Random(seed)
    folder = new_folder(place, "dashboards")
    second, beside = folder / "second", new_folder(folder, "beside")
    second.mkdir()
    for other in (second, beside):
        (other / "home").symlink_to(folder / "home")
    dashboard = Dashboard(folder, {"OMP_NUM_THREADS": "1"})
    for _ in range(number):
        findings.attempts += 1
        dashboard.start()
        if finish(command(second, "dashboard", "--port", "0"), second, findings, "the second dashboard") != 2:
            findings.add("status", f"the second dashboard: {said(second)}")
        mine = dashboard.begin("quantize", f"seed={dice.randrange(10**6)}")
        process = command(beside, "run", "tiny.toml", "--set", f"seed={dice.randrange(10**6)}")
        time.sleep(dice.uniform(1.0, _RUN_SECONDS))
        if dice.random() < 0.5:
            dashboard.kill()
        elif left := dashboard.stop(signal.SIGINT):
            findings.add("left", f"processes {left} outlived the dashboard")
        if finish(process, beside, findings, "a run beside the dashboard") not in {0, 3}:
            findings.add("status", f"a run beside the dashboard: {said(beside)[-500:]}")
        dashboard.start()
        with _noted(findings, "a run of the dashboard that was stopped"):
            until(lambda run=mine: dashboard.state(run) in {"Completed", "Crashed"}, 180, lambda: "no end")
            if dashboard.state(mine) == "Crashed":
                dashboard.retry(mine)
            dashboard.wait(mine)
        dashboard.stop()
    compare_stages(folder / "home", findings, "dashboards")
    if finish(command(beside, "run", "tiny.toml"), beside, findings, "the last run") not in {0, 3}:
        findings.add("status", f"the last run: {said(beside)[-500:]}")
    compare_outputs(folder / "home", expected, findings, "dashboards")
    return findings


@contextlib.contextmanager
def _noted(findings: Findings, what: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        findings.add("status", f"{what}: {str(error)[:800]}")


def full_disk(place: Path) -> Findings:
    """A disk that fills up under a dashboard and its runs, and then has room again."""
    findings = Findings("a full disk under a dashboard")
    folder = place / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        findings.attack += " (skipped: it needs the right to mount a tmpfs)"
        return findings
    try:
        dashboard = Dashboard(folder, {"OMP_NUM_THREADS": "1"})
        dashboard.start()
        findings.attempts += 1
        with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(b"\0" * 4096)
        with contextlib.suppress(AssertionError):
            dashboard.begin("quantize")
        time.sleep(30)
        (folder / "ballast").unlink()
        with _noted(findings, "a run when there is room again"):
            dashboard.wait(dashboard.begin("ptq"), seconds=180)
        assert dashboard.process is not None
        if dashboard.process.poll() is not None:
            findings.add("status", f"the dashboard ended with {dashboard.process.returncode}")
        if find_damage(Store(dashboard.home / "store"))[1]:
            findings.add("damage", "the store is damaged")
        if left := dashboard.stop():
            findings.add("left", f"processes {left} outlived the dashboard")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    return findings


def week(place: Path, nights: int, seed: int) -> Findings:
    """The shipped schedule at one night per minute, with power cuts: each night's runs finish.

    Prefect's timeouts are in real seconds, so a faster clock (libfaketime) would only make them all expire.
    """
    findings, dice = Findings("a week of the schedule, with power cuts"), random.Random(seed)
    folder = place / "week"
    folder.mkdir()
    dashboard = Dashboard(folder, {"OMP_NUM_THREADS": "1"})
    dashboard.start()
    for flow, deployment in dashboard.deployments().items():
        every = 60 if flow == "quantize" else 60 * nights
        path = f"/deployments/{deployment['id']}"
        dashboard.call(path, {"parameters": {"recipe": str(dashboard.recipe), "changes": []}}, method="PATCH")
        for schedule in deployment["schedules"]:
            dashboard.call(f"{path}/schedules/{schedule['id']}", method="DELETE")
        dashboard.call(f"{path}/schedules", [{"schedule": {"interval": every}, "active": True}])
    end = time.monotonic() + 60 * nights
    while time.monotonic() < end:
        time.sleep(dice.uniform(20, 90))
        findings.attempts += 1
        if dice.random() < 0.7:
            dashboard.kill()
        elif left := dashboard.stop():
            findings.add("left", f"processes {left} outlived the dashboard")
        dashboard.start()
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    due = {"expected_start_time": {"before_": now}}

    def unfinished() -> list[str]:
        runs = dashboard.runs(**due)
        for run in runs:
            if run["state"]["name"] == "Crashed":
                dashboard.retry(run["id"])
        return [run["state"]["name"] for run in runs if run["state"]["type"] not in {"COMPLETED", "CANCELLED"}]

    with _noted(findings, "the runs of the week"):
        until(lambda: not unfinished(), 600, lambda: str(unfinished()))
    if len(dashboard.runs(**due)) < nights:
        findings.add("status", f"only {len(dashboard.runs(**due))} runs in {nights} nights")
    compare_stages(dashboard.home, findings, "the week")
    dashboard.stop()
    return findings


def main() -> int:
    """Attack, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--damages", type=int, default=2000)
    parser.add_argument("--frees", type=int, default=10, help="runs whose store is freed under them")
    parser.add_argument("--dashboards", type=int, default=10, help="how often a dashboard comes and goes")
    parser.add_argument("--nights", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="kills, free, dashboards, disk, week or damage")
    options = parser.parse_args()

    from damages import damage_files

    # In the background of a script, SIGINT is ignored, also by every process started there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = Path(tempfile.mkdtemp(prefix="attack-"))
    print(f"Everything is below {place}", flush=True)
    expected = undisturbed(place)
    attacks: dict[str, Callable[[], list[Findings]]] = {
        "kills": lambda: kills(place, options.kills, options.seed, expected, options.jobs),
        "free": lambda: [free_while_computing(place, options.frees, options.seed, expected)],
        "dashboards": lambda: [dashboards(place, options.dashboards, options.seed, expected)],
        "disk": lambda: [full_disk(place)],
        "week": lambda: [week(place, options.nights, options.seed)],
        "damage": lambda: damage_files(place, options.damages, options.seed),
    }
    findings: list[Findings] = []
    for name in options.only or attacks:
        began = time.monotonic()
        findings += attacks[name]()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return tell(findings)


def tell(findings: list[Findings]) -> int:
    """Print the table; 1 if anything was found."""
    kinds = ("different", "twice", "hang", "traceback", "status", "damage", "left", "silent")
    print(f"{'attack':<60} {'attempts':>8}", *(f"{kind:>9}" for kind in kinds))
    for one in findings:
        print(f"{one.attack:<60} {one.attempts:>8}", *(f"{one.found[kind]:>9}" for kind in kinds))
    for one in findings:
        for example in one.examples[:5]:
            print(f"\n{example}")
    return int(any(one.examples for one in findings))


if __name__ == "__main__":
    raise SystemExit(main())
