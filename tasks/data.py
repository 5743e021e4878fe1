"""Stages that turn image files into decoded images."""

from quantlib.data.split import Subset
from quantlib.data.transforms import Transform
from quantlib.store.artifacts import Ref
from tasks.stage import Job, stage


@stage("decode-{branch}")
def decode(job: Job, images: Subset, transform: Transform, seed: int, *, branch: str) -> Ref:
    """Decode images once for all branches."""
    from quantlib.data import loading, shards

    split, indices = loading.select(images)
    batches = loading.decode(split, indices, transform, seed, job.progress)
    return job.store.write("images", lambda file: shards.save(batches, split.labels[indices], file))
