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
    pixels, labels = loading.decode(split, indices, transform, seed, job.progress), split.labels[indices]
    return job.store.write("images", lambda file: shards.save(pixels, labels, transform.normalization, file))
