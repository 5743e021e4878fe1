"""A million image files listed, identified by content, and identified again unchanged: against a bare walk with `stat`.

    python benchmarks/million_files.py FOLDER --data cifar10

FOLDER is made if there is none, of hard links to some training images of --data: a million take a minute and little
space, as only names are stored. Each measurement is a process of its own, for its peak memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pairs

from quantlib.data import datasets
from quantlib.inputs import find_inputs
from quantlib.recipe.schema import parse_recipe

NUM_CLASSES, NUM_ORIGINALS = 1000, 1000  # ext4 allows 65,000 links to a file.
STEPS = ("walk", "list", "identify", "identify again")


def make(folder: Path, data: Path, num_files: int) -> None:
    """Train and val, a twentieth of the files in val, as class folders."""
    (folder / "originals").mkdir(parents=True)
    files = sorted((data / "train").glob("*/*"))[:NUM_ORIGINALS]
    originals = [
        shutil.copy(file, folder / "originals" / f"{number}{file.suffix}") for number, file in enumerate(files)
    ]
    for number in range(num_files):
        original = originals[number % len(originals)]
        split = "val" if number // NUM_CLASSES % 20 == 0 else "train"
        place = folder / split / f"class{number % NUM_CLASSES:04}"
        place.mkdir(parents=True, exist_ok=True)
        os.link(original, place / f"{number:07}{original.suffix}")


def walk(folder: str) -> int:
    """The number of files below a folder, each looked at."""
    num_files, folders = 0, [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                else:
                    entry.stat()
                    num_files += 1
    return num_files


def measure(step: str, folder: str, cache: Path) -> dict[str, float]:
    """Seconds, and what the step added to this process's peak memory, in MB."""
    tables = {
        "data": {"format": "imagefolder", "root": folder},
        "model": {"weights": "train"},
        "ptq": [{"name": "ptq"}],
    }
    recipe = parse_recipe({"name": "million", **tables})
    before = pairs.peak_megabytes()
    start = time.perf_counter()
    if step == "walk":
        num_files = sum(walk(f"{folder}/{split}") for split in ("train", "val"))
    elif step == "list":
        splits = [datasets.open_split("imagefolder", folder, split) for split in ("train", "val")]
        num_files = sum(map(len, splits))
    else:
        found = find_inputs(recipe, cache)
        num_files = found.train.num_images + found.val.num_images
    seconds = time.perf_counter() - start
    return {"num_files": num_files, "seconds": seconds, "megabytes": pairs.peak_megabytes() - before}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, help="train/CLASS/IMAGE, to make FOLDER of")
    parser.add_argument("--num-files", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        if arguments.data is None:
            parser.error(f"there is no {arguments.folder}: give --data, to make it.")
        make(arguments.folder, arguments.data, arguments.num_files)
    found: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    with tempfile.TemporaryDirectory() as name:

        def run(step: str) -> float:
            cache = Path(name) / f"{len(found['walk'])}"  # A new one each round.
            command = [sys.executable, __file__, "--child", step, str(arguments.folder), str(cache)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[step].append(json.loads(done.stdout))
            return found[step][-1]["seconds"]

        seconds = pairs.in_turn({step: partial(run, step) for step in STEPS}, arguments.rounds)
    ratios = {f"{step} / walk": pairs.ratio(seconds, step, "walk") for step in STEPS[1:]}
    num_files = int(found["list"][0]["num_files"])
    pairs.conclude(f"{num_files} files time", "seconds", seconds, ratios)
    for step, values in seconds.items():
        seconds[step] = [value * 100_000 / num_files for value in values]
    pairs.conclude(f"{num_files} files, time per 100,000", "seconds", seconds, {})
    memory = {step: [one["megabytes"] for one in each] for step, each in found.items()}
    pairs.conclude(f"{num_files} files memory", "peak_MB", memory, {})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
    else:
        main()
