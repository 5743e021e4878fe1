"""Cost of a run with nothing to do, against an empty Prefect flow: `python benchmarks/idle_run.py`.

Each runs in its own process, with Prefect's embedded server; the two take turns.
"""

import sys
import tempfile

import pairs

NUM_ROUNDS = 7
EMPTY_FLOW = """
from prefect import flow

@flow
def empty():
    return 1

empty()
"""


def main() -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "flows.cli.commands", "run", "digits", "--home", f"{folder}/home"]
        quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_HOME": f"{folder}/prefect"}
        sides = {
            "run with nothing to do": lambda: pairs.seconds(run),
            "empty Prefect flow": lambda: pairs.seconds([sys.executable, "-c", EMPTY_FLOW], quiet),
        }
        print("first runs (cold store, new databases) …", flush=True)
        for first in sides.values():
            first()
        samples = pairs.in_turn(sides, NUM_ROUNDS)
    pairs.conclude("idle run", "seconds", samples, {"run / flow": pairs.ratio(samples, *sides)})


if __name__ == "__main__":
    main()
