"""Stages that turn image files into decoded images."""

from quantlib.data.split import Selection
from quantlib.data.transforms import Transform
from quantlib.store.artifacts import Ref
from tasks.caching import stage
from tasks.run import current_run


@stage("decode-{branch}")
def decode(images: Selection, transform: Transform, seed: int, *, branch: str) -> Ref:
    """Decode images once, for every branch."""
    from quantlib.data import loading, shards

    run = current_run()
    split, indices = loading.select(images)
    batches = loading.decode(split, indices, transform, seed, run.progress)
    return run.store.write("images", lambda file: shards.save(batches, split.labels[indices], file))
