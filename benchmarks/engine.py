"""What a stage costs on a cluster: the same trivial stage computed by Dask's engine and in this process, in turns.

    python benchmarks/engine.py --num-stages 200 --to engine.parquet

The stage chooses among one epoch, which takes no time. Each sample is one stage, after one of each to warm up. On a
cluster, several stages run at once: with --at-once 4, four threads ask for stages.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.hosting.cluster import open_executor
from quantlib.measure import predictions
from quantlib.measure.predictions import Predictions
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.execution import Executor, LocalExecutor
from tasks.quantize import choose_epoch
from tasks.stage import Job


def main() -> None:
    """Measure both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-stages", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        store = Store(home / "store")
        answers = Predictions(np.zeros(10, int), np.zeros((10, 1), int), np.zeros(10, np.float32))
        inputs = store.put("int8-model", b"model"), store.put("predictions", predictions.save(answers))
        with open_executor("dask", home, print) as cluster:
            seconds = measure({"here": LocalExecutor(), "dask": cluster}, store, inputs, options)
    for name, samples in seconds.items():
        low, median, high = statistics.quantiles(samples, n=4)
        print(f"{name:<6} median {1000 * median:7.2f} ms   quartiles {1000 * low:.2f} to {1000 * high:.2f} ms")
    if options.to is not None:
        rows = [{"engine": name, "seconds": sample} for name, samples in seconds.items() for sample in samples]
        pq.write_table(pa.Table.from_pylist(rows), options.to)


def measure(
    executors: dict[str, Executor], store: Store, inputs: tuple[Ref, Ref], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each stage, by engine, without the first."""
    model, evaluation = inputs

    def compute(executor: Executor) -> float:
        arguments = choose_epoch.bind((model,), (model,), ((evaluation,),), branch="x")
        job, nothing = Job(store, lambda *_: None), lambda: None
        clock = time.perf_counter()
        executor.compute(choose_epoch, arguments, choose_epoch.ingredients(arguments), job, nothing, nothing)
        return time.perf_counter() - clock

    def sample(executor: Executor) -> list[float]:
        with ThreadPoolExecutor(options.at_once) as pool:
            return list(pool.map(lambda _: compute(executor), range(options.at_once)))

    found: dict[str, list[float]] = {name: [] for name in executors}
    for number in range(1 + options.num_stages // options.at_once):
        for name, executor in executors.items():
            taken = sample(executor)
            found[name] += taken if number else []
    return found


if __name__ == "__main__":
    main()
