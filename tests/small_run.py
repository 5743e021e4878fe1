"""A run of stages that take milliseconds, as a machine runs them: with a home, a journal, and locks or leases.

One stage gives another result each time, and most others follow from it: machines that did not continue from the same
record of it would have different artifacts.
"""

import hashlib
import os
import time

from prefect.client.schemas.objects import State

from quantlib.recipe.schema import parse_recipe
from quantlib.store.journal import Journal
from quantlib.store.opening import open_store
from tasks.execution import LiveRun
from tasks.listener import NullListener
from tasks.run import home_folder
from tasks.stage import stage

RECIPE = {"name": "small", "model": {"weights": "train"}, "data": {"format": "digits"}, "ptq": [{"name": "p"}]}
# The same stages, and two of its own.
LONGER = {**RECIPE, "name": "longer"}
# Without the stage whose result is random.
CERTAIN = {**RECIPE, "name": "certain"}
PAUSE_S = 0.03


def _derive(job, name, *inputs):
    digest = hashlib.sha256(name.encode())
    for number, ref in enumerate(inputs):
        digest.update(job.store.read(ref))
        job.progress(number, len(inputs) + 1)
        time.sleep(PAUSE_S)
    job.progress(len(inputs), len(inputs) + 1)
    return job.store.put("small", digest.digest() * 1000)


@stage("make-{number}")
def make(job, number):
    return _derive(job, f"make {number}")


@stage("draw")
def draw(job, source):
    _derive(job, "draw", source)
    return job.store.put("small", os.urandom(1000))


@stage("combine-{number}")
def combine(job, first, second, number):
    return _derive(job, f"combine {number}", first, second)


def run_stages(run_id, recipe):
    """Run them; returns their outputs as the only row of the table, and which were reused."""
    home, recipe = home_folder(), parse_recipe(recipe)
    journal = Journal(home / "runs" / (run_id or f"run-{os.urandom(4).hex()}"))
    store = open_store(home)
    with journal.record("quantize", recipe, None), store.in_use(journal):
        run = LiveRun(home, store, journal, NullListener())
        outputs = {}

        def call(stage, *arguments):
            bound = stage.bind(*arguments)
            ended = run.reuse_or_compute(stage, bound)
            ref = ended.data if isinstance(ended, State) else ended
            outputs[stage.label_for(bound)] = ref.sha256
            return ref

        made = [call(make, number) for number in range(4)]
        drawn = made[0] if recipe.name == "certain" else call(draw, made[0])
        for number in range(8 if recipe.name == "longer" else 6):
            made.append(call(combine, drawn, made[-1], number))
    return {"variants": [outputs], "stages": {row.stage: row.cached for row in run.stages}}
