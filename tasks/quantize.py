"""Stages that quantize: calibrate, choose_ranges, correct_bias, convert, qat_epoch, choose_epoch."""

from collections.abc import Sequence

from quantlib.data.split import Subset
from quantlib.data.transforms import Transform
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.scheme import Scheme
from quantlib.store.artifacts import Ref
from tasks.run import Run
from tasks.stage import Job, stage


@stage("calibrate-{branch}")
def calibrate(
    job: Job, before: Ref, images: Ref, float_layers: tuple[str, ...], batch_size: int, *, branch: str
) -> Ref:
    """Show a shard of calibration images to a fused model, or to that of the shard before.

    What it collects serves every scheme: branches that differ in observer, weights or bits alone share it.
    """
    from quantlib.models import checkpoint
    from quantlib.quantize import calibration

    observed, header = calibration.load_or_observe(job.store.read(before), float_layers)
    calibration.calibrate(observed, job.store.path(images), batch_size, job.progress)
    return job.store.put("model", checkpoint.save(observed, header))


@stage("choose_ranges-{branch}")
def choose_ranges(job: Job, observed: Ref, scheme: Scheme, *, branch: str) -> Ref:
    """Give each activation the range that the scheme's observer finds in what calibration has collected."""
    from quantlib.quantize import calibration

    store = job.store
    return store.put("model", calibration.choose_ranges(store.read(observed), scheme))


@stage("correct_bias-{branch}")
def correct_bias(job: Job, prepared: Ref, images: tuple[Ref, ...], *, branch: str) -> Ref:
    """Give each layer of a calibrated model the mean output that it has in float."""
    from quantlib.models import checkpoint
    from quantlib.quantize import bias_correction, calibration

    store = job.store
    module, header = calibration.load_prepared(store.read(prepared))
    corrected = bias_correction.correct_bias(module, [store.path(ref) for ref in images])
    return store.put("model", checkpoint.hand_over(corrected, header))


@stage("convert-{branch}")
def convert(job: Job, prepared: Ref, engine: str, crop: int, *, branch: str) -> Ref:
    """Make a calibrated model, or an epoch's state, int8."""
    from quantlib.quantize import conversion

    store = job.store
    return store.put("model", conversion.convert_saved(store.read(prepared), engine, crop))


@stage("start_qat-{branch}")
def start_qat(job: Job, trainable: Ref, calibrated: Ref, *, branch: str) -> Ref:
    """Give a model fused for QAT the biases and ranges of a calibrated one."""
    from quantlib.graph import fusion
    from quantlib.models import checkpoint
    from quantlib.quantize import calibration, qat
    from quantlib.recipe.scheme import Scheme

    store = job.store
    module, header = fusion.load(store.read(trainable))
    source, source_header = calibration.load_prepared(store.read(calibrated))
    model = qat.start_from(module, source, Scheme.from_header(source_header))
    return store.put("model", checkpoint.save(model, header | {"scheme": source_header["scheme"]}))


@stage("qat_epoch-{branch}-{epoch}")
def qat_epoch(
    job: Job,
    before: Ref,
    epoch: int,
    scheme: Scheme,
    schedule: Schedule,
    images: Subset,
    transform: Transform,
    teacher: Ref | None,
    *,
    branch: str,
) -> tuple[Ref, Ref]:
    """Train one epoch from the start, or from the epoch before; the new state, and its metrics."""
    from quantlib.data import loading
    from quantlib.graph import fusion
    from quantlib.models import checkpoint
    from quantlib.quantize import calibration, qat

    model, header = calibration.load_or_prepare(job.store.read(before), scheme)
    split, indices = loading.select(images)
    taught_by = fusion.load(job.store.read(teacher))[0] if teacher is not None else None
    metrics = qat.train_epoch(model, epoch, schedule, split, indices, transform, taught_by, job.progress)
    return job.store.put("model", checkpoint.hand_over(model, header)), job.store.put_json("metrics", metrics)


def has_stalled(run: Run, evaluations: Sequence[tuple[Ref, ...]], patience: int) -> bool:
    """Whether none of the last `patience` candidates was better than all before them.

    No stage: it reads what stages found.

    Raises:
        NotYetKnownError: Where the run is only planned, and one of them was not evaluated before.
    """
    from quantlib.measure import predictions

    store = run.known(evaluations)
    top1 = [predictions.load_shards(map(store.read, parts)).top1 for parts in evaluations]
    return len(top1) - 1 - top1.index(max(top1)) >= patience


@stage("choose_epoch-{branch}")
def choose_epoch(
    job: Job,
    artifacts: tuple[Ref, ...],
    states: tuple[Ref, ...],
    evaluations: tuple[tuple[Ref, ...], ...],
    *,
    branch: str,
) -> tuple[Ref, Ref, Ref]:
    """The candidate that is most accurate on the selection images; of equals, the first.

    Its artifact, its state, and its place among the candidates.

    The candidates are what QAT started from, where that is a calibrated model, and its epochs.
    """
    from quantlib.measure import predictions

    store = job.store
    top1 = [predictions.load_shards(map(store.read, parts)).top1 for parts in evaluations]
    best = top1.index(max(top1))
    return artifacts[best], states[best], job.store.put_json("choice", best)
