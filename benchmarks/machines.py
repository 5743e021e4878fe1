"""How long a run would take on several machines: a simulation with what a run on one machine measured.

    quantflow run search.toml --home home
    python benchmarks/machines.py home --images 50000 --machines 1 4 16

The stages of the home's last run, their seconds and their artifacts' sizes are taken from its records; the stages that
decode or evaluate validation images are repeated until there are enough of these. A stage begins once what it reads is
there, on the first idle machine, which downloads what it lacks, and uploads what it made. Files are timed on the first
machine. A search begins its first trials together; each later one, a copy of the last that was
measured, waits for those before it.
"""

import argparse
import heapq
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq

from quantlib.recipe.sections import SearchRecipe
from quantlib.search import free_trials
from quantlib.store.local import Store

SHARD_IMAGES = 1783  # At 224 px: 256 MiB of pixels.
PER_IMAGE = re.compile(r"(decode-validation-\d+|evaluate_baseline-float|evaluate-.*)(?<!held_out)")
TRIAL = re.compile(r".*search-(\d+)-.*")


@dataclass(frozen=True)
class Node:
    """A stage: what it reads, what it makes, and how long it takes on one machine."""

    label: str
    seconds: float
    inputs: frozenset[str]
    outputs: tuple[str, ...]
    after: frozenset[str] = frozenset()
    """Artifacts that it waits for and does not read."""


@dataclass
class Machine:
    """A machine that computes one stage at a time."""

    number: int
    free_at: float = 0.0
    busy: float = 0.0
    has: set[str] = field(default_factory=set)


def read(home: Path) -> tuple[list[Node], dict[str, int], int]:
    """The stages of a home's last run, the artifacts' sizes, and how many validation images it had."""
    folder = max((home / "reports" / "stages").iterdir(), key=lambda path: path.stat().st_mtime)
    rows = pq.read_table(folder, partitioning=None).to_pylist()
    variants = pq.read_table(home / "reports" / "variants" / folder.name, partitioning=None).to_pylist()
    store, sizes, nodes = Store(home / "store"), {}, []
    for row in rows:
        record = store.read_record(row["key"])
        assert record is not None
        sizes |= {ref.sha256: ref.size for ref in record.outputs}
        outputs = tuple(ref.sha256 for ref in record.outputs)
        inputs = frozenset(set(record.ingredients.values()) & set(sizes))
        nodes.append(Node(row["stage"], record.seconds, inputs, outputs))
    return nodes, sizes, variants[0]["num_images"]


def in_trials(nodes: Sequence[Node], sizes: dict[str, int], num_trials: int) -> list[Node]:
    """The stages of this many trials, which wait for each other, and of files that are evaluated once all are timed."""
    by_trial: dict[int, list[Node]] = {}
    for node in nodes:
        if trial := TRIAL.fullmatch(node.label):
            by_trial.setdefault(int(trial[1]), []).append(node)
    last = max(by_trial)
    for number in range(last + 1, num_trials + 1):
        new = {output: f"{output}@{number}" for node in by_trial[last] for output in node.outputs}
        sizes |= {copy: sizes[output] for output, copy in new.items()}
        by_trial[number] = [
            Node(
                node.label.replace(f"search-{last}-", f"search-{number}-"),
                node.seconds,
                frozenset(new.get(each, each) for each in node.inputs),
                tuple(new[each] for each in node.outputs),
            )
            for node in by_trial[last]
        ]
    (timing,) = (node for node in nodes if node.label == "benchmark-variants")
    files = {each for number in by_trial for node in by_trial[number] if "save_" in node.label for each in node.outputs}
    found = [replace(node, after=node.after | files) if node is timing else node for node in nodes]
    found = [node for node in found if not TRIAL.fullmatch(node.label)]
    judged: frozenset[str] = frozenset()
    for number, own in sorted(by_trial.items()):
        waits = judged if number > len(free_trials(SearchRecipe())) else frozenset()
        for node in own:
            is_last = node.label.startswith("evaluate-") and PER_IMAGE.fullmatch(node.label)
            found.append(replace(node, after=frozenset(timing.outputs) if is_last else waits))
            if node.label.startswith("evaluate-") and not is_last:
                judged |= frozenset(node.outputs)
    return found


def repeat(nodes: Iterable[Node], sizes: dict[str, int], num_measured: int, num_images: int) -> Iterator[Node]:
    """The stages for more validation images: those that take time for each are repeated, shard by shard."""
    count, shards = math.ceil(num_images / SHARD_IMAGES), set()
    for node in nodes:
        if not PER_IMAGE.fullmatch(node.label):
            everything = node.label == "pick_examples"
            inputs = {f"{each}#{n}" for each in node.inputs & shards for n in (range(count) if everything else [0])}
            yield replace(node, inputs=(node.inputs - shards) | inputs)
            continue
        for number in range(count):
            images = min(SHARD_IMAGES, num_images - number * SHARD_IMAGES)
            inputs = {f"{each}#{number}" if each in shards else each for each in node.inputs}
            outputs = tuple(f"{each}#{number}" for each in node.outputs)
            sizes |= {new: sizes[old] * images // num_measured for new, old in zip(outputs, node.outputs, strict=True)}
            seconds = node.seconds * images / num_measured
            yield Node(f"{node.label} {number}", seconds, frozenset(inputs), outputs, node.after)
        shards |= set(node.outputs)


def simulate(nodes: Sequence[Node], sizes: dict[str, int], count: int, options: argparse.Namespace) -> list[float]:
    """Seconds until the end, of it seconds that machines computed, and gigabytes moved."""
    machines = [Machine(number) for number in range(count)]
    made = {output for node in nodes for output in node.outputs}
    done: set[str] = set()
    waiting, running, clock, moved = list(nodes), [], 0.0, 0
    while waiting or running:
        for node in list(waiting):
            idle = [machine for machine in machines if machine.free_at <= clock]
            alone = node.label.startswith("benchmark")
            usable = [machine for machine in idle if machine.number == 0] if alone else idle
            if not idle:
                break
            if not usable or not ((node.inputs | node.after) & made) <= done:
                continue
            machine = usable[0]
            lacking = node.inputs - machine.has if count > 1 else ()
            size = sum(sizes[each] for each in (*lacking, *(node.outputs if count > 1 else ())))
            taken = options.overhead + size / options.bandwidth + node.seconds if count > 1 else node.seconds
            moved += size
            machine.free_at, machine.busy = clock + taken, machine.busy + node.seconds
            machine.has |= {*node.inputs, *node.outputs}
            heapq.heappush(running, (machine.free_at, id(node), node))
            waiting.remove(node)
        clock, _, ended = heapq.heappop(running)
        done |= set(ended.outputs)
    return [clock, sum(machine.busy for machine in machines), moved / 1e9]


def chain(nodes: Sequence[Node]) -> tuple[float, list[str]]:
    """The longest chain of stages that wait for each other: its seconds and its stages."""
    maker = {output: node for node in nodes for output in node.outputs}
    ends: dict[str, tuple[float, list[str]]] = {}

    def end_of(node: Node) -> tuple[float, list[str]]:
        if node.label not in ends:
            before = [end_of(maker[each]) for each in node.inputs | node.after if each in maker]
            seconds, labels = max(before, default=(0.0, []))
            ends[node.label] = seconds + node.seconds, [*labels, node.label]
        return ends[node.label]

    return max(map(end_of, nodes))


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("--trials", type=int, default=12, help="of the search")
    parser.add_argument("--images", type=int, default=50_000, help="validation images")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--overhead", type=float, default=0.0176, help="seconds of a stage; see engine.py")
    parser.add_argument("--bandwidth", type=float, default=125e6, help="bytes per second of each machine")
    options = parser.parse_args()
    measured, sizes, num_measured = read(options.home)
    nodes = list(repeat(in_trials(measured, sizes, options.trials), sizes, num_measured, options.images))
    print(f"{len(measured)} stages with {num_measured} images, {len(nodes)} with {options.images}")
    alone = None
    for count in options.machines:
        seconds, busy, gigabytes = simulate(nodes, sizes, count, options)
        alone = alone or seconds
        print(
            f"{count:4} machines {seconds:8.0f} s   {alone / seconds:5.2f}x   busy {busy / seconds / count:4.0%}   "
            f"{gigabytes:6.1f} GB moved"
        )
    seconds, labels = chain(nodes)
    print(f"longest chain: {seconds:.0f} s, {len(labels)} stages; its longest:")
    by_label = {node.label: node.seconds for node in nodes}
    for label in sorted(labels, key=lambda label: -by_label[label])[:12]:
        print(f"  {by_label[label]:7.1f} s  {label}")


if __name__ == "__main__":
    main()
