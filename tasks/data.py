"""Stages that turn image files into decoded images."""

from quantlib.inputs import Selection
from quantlib.store import Ref
from quantlib.transforms import Transform
from tasks.caching import stage
from tasks.run import current_run


@stage("decode-{branch}")
def decode(images: Selection, transform: Transform, seed: int, *, branch: str) -> Ref:
    """Decode images once, for every branch."""
    from quantlib import data
    from quantlib import images as shards

    run = current_run()
    split, indices = data.select(images)
    batches = data.decode(split, indices, transform, seed, run.progress)
    return run.store.write("images", lambda file: shards.save(batches, split.labels[indices], file))
