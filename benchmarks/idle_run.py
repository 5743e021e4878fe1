"""What a run costs that has nothing to do, beside an empty Prefect flow: `python benchmarks/idle_run.py`.

Each is a process of its own, with Prefect's embedded server; the two take turns. Prints the medians and their ratio,
and writes every sample to idle_run.parquet in the working directory.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NUM_PAIRS = 7
EMPTY_FLOW = """
from prefect import flow

@flow
def empty():
    return 1

empty()
"""


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall-clock time of a command."""
    start = time.perf_counter()
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "flows.cli", "run", "digits", "--home", f"{folder}/home"]
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_HOME": f"{folder}/prefect"}
        empty = [sys.executable, "-c", EMPTY_FLOW]
        print("first runs (cold store, new databases) …", flush=True)
        seconds(run, {})
        seconds(empty, quiet)
        pairs = [(seconds(run, {}), seconds(empty, quiet)) for _ in range(NUM_PAIRS)]
    idle, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    for name, figure in (
        ("run with nothing to do", idle),
        ("empty Prefect flow", bare),
        ("ratio, pair by pair", ratio),
    ):
        print(f"{name:<24}{figure:6.2f}")
    table = pa.table({"idle_run_s": [a for a, _ in pairs], "empty_flow_s": [b for _, b in pairs]})
    pq.write_table(table, Path("idle_run.parquet"))


if __name__ == "__main__":
    main()
