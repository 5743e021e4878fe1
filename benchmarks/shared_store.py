"""A shared store: what a hit costs, and how many bytes and requests a run of the digits moves.

python benchmarks/shared_store.py

The servers are on this machine, so a network's round trips come on top: a hit is one request for the record, and one
for each artifact.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pairs

from quantlib.store.artifacts import Record
from quantlib.store.opening import open_store

NUM_ROUNDS = 5
NUM_HITS = 100
# One request at a time: with threads, moto looks for an object and then writes it, and two may find none.
_SERVE = """
import sys
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""
# Runs the digits on a home and prints what it asked of the shared store.
_RUN = """
import json, os, sys
from collections import Counter
from pathlib import Path
from quantlib.store import bucket
counts = Counter()

def count(name, size):
    original = getattr(bucket.BucketObjects, name)
    def counted(self, *arguments):
        answer = original(self, *arguments)
        counts["requests"] += 1
        counts[name] += 1
        counts["bytes up" if name in ("create", "replace", "upload") else "bytes down"] += size(arguments, answer)
        return answer
    setattr(bucket.BucketObjects, name, counted)

count("get", lambda arguments, answer: len(answer.content) if answer else 0)
count("create", lambda arguments, answer: len(arguments[1]))
count("replace", lambda arguments, answer: len(arguments[1]))
count("size", lambda arguments, answer: 0)
count("upload", lambda arguments, answer: arguments[1].stat().st_size)
count("download", lambda arguments, answer: arguments[1])
from flows.cli.commands import main
try:
    main(["run", "--home", sys.argv[1]])
except SystemExit as ended:
    if ended.code not in (0, 3):
        raise
Path(sys.argv[2]).write_text(json.dumps(counts))
"""


def main() -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "shared").mkdir()
        server, server_url = _start_server()
        try:
            os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
            os.environ |= {"AWS_ENDPOINT_URL": server_url}
            urls = {"this home": "", "shared folder": str(place / "shared"), "moto's S3": "s3://bucket/hits"}
            sides = {f"a hit, {name}": _measure_hits(place / name, url) for name, url in urls.items()}
            samples = pairs.in_turn(sides, NUM_ROUNDS)
            moved = [_measure_run(place, name) for name in ("first machine", "second machine")]
        finally:
            server.kill()
    for name, counts in zip(("computes all", "reuses all"), moved, strict=True):
        print(f"  a run that {name}: {', '.join(f'{value:,} {what}' for what, value in counts.items())}")
    pairs.conclude("shared store", "ms", samples, {})


def _measure_hits(home: Path, store_url: str) -> Callable[[], float]:
    """Milliseconds that a hit takes: a record of two artifacts, which the machine has in its cache."""

    def milliseconds() -> float:
        os.environ["QUANTFLOW_STORE"] = store_url
        store = open_store(home)
        outputs = tuple(store.put("model", os.urandom(1000)) for _ in range(2))
        store.add_record(Record("key", "fuse", {}, outputs, 1.0, "2026-01-01T00:00:00+00:00"))
        samples = []
        for _ in range(NUM_HITS):
            start = time.perf_counter()
            store.find_record("key")
            samples.append((time.perf_counter() - start) * 1000)
        return statistics.median(samples)

    return milliseconds


def _measure_run(place: Path, name: str) -> dict[str, int]:
    """What a run on an empty home asks of the object store."""
    counts = place / f"{name}.json"
    pairs.seconds([sys.executable, "-c", _RUN, place / name, counts], {"QUANTFLOW_STORE": "s3://bucket/run"})
    return json.loads(counts.read_text())


def _start_server() -> tuple[subprocess.Popen[bytes], str]:
    """A server of moto's with a bucket, and its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([sys.executable, "-c", _SERVE, str(port)], stdout=quiet, stderr=quiet)
    url = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()  # noqa: S310
        except OSError:
            time.sleep(0.1)
        else:
            return server, url
    server.kill()
    sys.exit("moto's server does not answer: pip install 'moto[server]'")


if __name__ == "__main__":
    main()
