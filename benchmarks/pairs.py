"""Two or more sides of a question, measured in turn, so a change in the machine's speed affects each alike."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Samples = dict[str, list[float]]


def seconds(command: Sequence[object], environment: Mapping[str, str] = {}) -> float:
    """Wall-clock time of a command that must succeed, in seconds; what it prints is shown if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start


def peak_megabytes() -> float:
    """Peak resident memory of this process; what `getrusage` says begins with that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def in_turn(sides: Mapping[str, Callable[[], float]], num_rounds: int) -> Samples:
    """Samples of every side, measured in turn in each round."""
    samples: Samples = {name: [] for name in sides}
    for number in range(num_rounds):
        for name, measure in sides.items():
            samples[name].append(measure())
            print(f"  round {number + 1} of {num_rounds}  {name:<44} {samples[name][-1]:10.3f}", flush=True)
    return samples


def ratio(samples: Samples, above: str, below: str) -> float:
    """Median over the rounds of one side divided by the other."""
    return statistics.median(a / b for a, b in zip(samples[above], samples[below], strict=True))


def conclude(question: str, unit: str, samples: Samples, ratios: Mapping[str, float]) -> None:
    """Print medians and ratios, and write every sample to QUESTION.parquet in the working directory."""
    print(f"\n{question} ({unit}, medians of {len(next(iter(samples.values())))})")
    for name, values in samples.items():
        print(f"  {name:<58} {statistics.median(values):10.3f}")
    for name, value in ratios.items():
        print(f"  {name:<58} {value:9.2f}x")
    rows = [
        {"side": name, "round": number, unit: value}
        for name, values in samples.items()
        for number, value in enumerate(values)
    ]
    pq.write_table(pa.Table.from_pylist(rows), Path(f"{question.replace(' ', '_')}.parquet"))
