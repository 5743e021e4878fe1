"""Images that a certain verdict takes, and how often it is wrong: `python benchmarks/certain_stop.py`.

5,000 images, of which some are answered differently by float and int8, in 200 random orders per row. After every 250
of them, the interval of 95% confidence is compared with a gate of one point, as with `stop = "certain"`. The other side
is the interval for a fixed number of images, looked at just as often. Writes every verdict to certain_stop.parquet.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quantlib.measure.confidence_sequence import sequential_drop
from quantlib.measure.significance import PairedDrop, paired_drop

NUM_IMAGES, SHARD, GATE, NUM_VERDICTS = 5000, 250, 0.01, 200
# True drops; and the share of images on which exactly one of the two is right.
CASES = (
    (0.0, 0.01),
    (0.0, 0.02),
    (0.0, 0.03),
    (0.005, 0.01),
    (0.005, 0.02),
    (0.005, 0.03),
    (0.011, 0.02),
    (0.03, 0.05),
)
METHODS: dict[str, Callable[[np.ndarray, np.ndarray], PairedDrop]] = {
    "betting": lambda correct, other: sequential_drop(correct, other, num_images=NUM_IMAGES),
    "fixed": paired_drop,
}


def draw(drop: float, differing: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which of the images float and int8 get right, in random order."""
    lost = round(NUM_IMAGES * (differing + drop) / 2)
    won = round(NUM_IMAGES * differing) - lost
    kinds = rng.permutation(np.repeat([1, -1, 0], [lost, won, NUM_IMAGES - lost - won]))
    return kinds >= 0, kinds <= 0


def decide(method: str, correct: np.ndarray, other: np.ndarray) -> tuple[int, bool]:
    """How many images it took, and whether the drop is taken to be inside the gate."""
    for num_images in range(SHARD, NUM_IMAGES, SHARD):
        found = METHODS[method](correct[:num_images], other[:num_images])
        if found.high <= GATE or found.low > GATE:
            return num_images, found.high <= GATE
    return NUM_IMAGES, bool(np.mean(correct) - np.mean(other) <= GATE)


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("certain_stop.parquet"))
    out = parser.parse_args().out
    print(f"{'drop':>6} {'differ':>7} {'method':>8} {'median':>7} {'90%':>6} {'wrong':>10}")
    rows = []
    for drop, differing in CASES:
        for method in METHODS:
            rng = np.random.default_rng(0)
            found = [decide(method, *draw(drop, differing, rng)) for _ in range(NUM_VERDICTS)]
            used, wrong = [images for images, _ in found], [inside != (drop <= GATE) for _, inside in found]
            rows += [
                {"drop": drop, "differing": differing, "method": method, "num_images": images, "inside": inside}
                for images, inside in found
            ]
            print(
                f"{drop:6.1%} {differing:7.1%} {method:>8} {np.median(used):7.0f} {np.percentile(used, 90):6.0f} "
                f"{sum(wrong):>3} of {NUM_VERDICTS}",
                flush=True,
            )
    pq.write_table(pa.Table.from_pylist(rows), out)
    print(f"samples: {out}")


if __name__ == "__main__":
    main()
