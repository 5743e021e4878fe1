"""Time from `quantflow dashboard` to the first page: `python benchmarks/dashboard_start.py [OTHER_CHECKOUT]`.

On a new home, and on one it has already run on. With another checkout, the two take turns, and the ratios of the pairs
are printed. Every sample is written to dashboard_start.parquet in the working directory.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NUM_STARTS = 5
HOMES = ("new home", "known home")


def first_page(checkout: Path, home: Path) -> float:
    """Seconds from the command to the web interface's first page, as a browser receives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flows.cli.commands", "dashboard", "--home", str(home), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Dashboard: "):
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
            assert b"<html" in page.read()
        return time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)


def main() -> None:
    """Measure, print, write."""
    checkouts = [Path(__file__).parents[1], *map(Path, sys.argv[1:2])]
    rows = []
    for number in range(-1, NUM_STARTS):  # An environment's first start is not typical.
        for place, checkout in enumerate(checkouts):
            with tempfile.TemporaryDirectory() as home:
                for kind in HOMES:
                    seconds = first_page(checkout, Path(home))
                    rows.append({"checkout": place, "home": kind, "start": number, "seconds": seconds})
    for kind in HOMES:
        samples = [
            [row["seconds"] for row in rows if (row["checkout"], row["home"]) == (place, kind) and row["start"] >= 0]
            for place in range(len(checkouts))
        ]
        medians = ", ".join(f"{statistics.median(found):.2f} s" for found in samples)
        ratio = statistics.median(a / b for a, b in zip(samples[0], samples[-1], strict=True))
        print(f"{kind:<12}{medians}" + (f", ratio {ratio:.2f}" if len(checkouts) > 1 else ""))
    pq.write_table(pa.Table.from_pylist(rows), Path("dashboard_start.parquet"))


if __name__ == "__main__":
    main()
