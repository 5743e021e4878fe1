"""Stages that quantize: calibrate, choose_ranges, correct_bias, convert, qat_epoch, choose_epoch."""

from collections.abc import Sequence
from dataclasses import replace

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
    """Show a shard of calibration images to a fused model, or to the model that the previous shard left.

    What it collects serves every scheme: branches that differ only in observer, weights or bits share it.
    """
    from quantlib.models import checkpoint
    from quantlib.quantize import calibration, preparation, stored

    model, header = stored.open_model(job.store.read(before))
    if header.state == "fused":
        model = preparation.observe(model, float_layers, inplace=True)
        header = replace(header, observed=float_layers, int8_layers=tuple(preparation.int8_layers(model)))
    calibration.calibrate(model, job.store.path(images), batch_size, job.progress)
    return job.store.put(header.kind, checkpoint.save(model, header))


@stage("choose_ranges-{branch}")
def choose_ranges(job: Job, observed: Ref, scheme: Scheme, *, branch: str) -> Ref:
    """Give each activation the range that the scheme's observer finds in what calibration collected."""
    from quantlib.quantize import calibration, stored

    store = job.store
    model, before = stored.open_model(store.read(observed))
    header = replace(before, observed=None, scheme=scheme)
    calibration.choose_ranges(model, scheme)
    return store.put(header.kind, stored.hand_over(model, header))


@stage("correct_bias-{branch}")
def correct_bias(job: Job, prepared: Ref, images: tuple[Ref, ...], *, branch: str) -> Ref:
    """Correct the biases of a calibrated model so that each layer has the same mean output as in float."""
    from quantlib.quantize import bias_correction, stored

    store = job.store
    module, header = stored.open_model(store.read(prepared))
    assert header.scheme is not None  # Every calibrated model has one.
    corrected = bias_correction.correct_bias(module, header.scheme, [store.path(ref) for ref in images])
    return store.put(header.kind, stored.hand_over(corrected, header))


@stage("convert-{branch}")
def convert(job: Job, prepared: Ref, *, branch: str) -> Ref:
    """The quantized model of a calibrated model, or of an epoch's state: every file is written from it."""
    from quantlib.quantize import conversion, stored

    store = job.store
    module, before = stored.open_model(store.read(prepared))
    assert before.scheme is not None  # Every prepared model has one.
    header = replace(before, quantized=True)
    return store.put(header.kind, stored.hand_over(conversion.convert(module, before.scheme, inplace=True), header))


@stage("start_qat-{branch}")
def start_qat(job: Job, trainable: Ref, calibrated: Ref, *, branch: str) -> Ref:
    """Give a model fused for QAT the biases and ranges of a calibrated model."""
    from quantlib.models import checkpoint
    from quantlib.quantize import qat, stored

    store = job.store
    fused, before = stored.open_model(store.read(trainable))
    source, its_header = stored.open_model(store.read(calibrated))
    assert its_header.scheme is not None  # Every calibrated model has one.
    header = replace(before, scheme=its_header.scheme, int8_layers=its_header.int8_layers)
    return store.put(header.kind, checkpoint.save(qat.start_from(fused, source, its_header.scheme), header))


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
    """Train one epoch from the start or from the previous epoch; return the new state and its metrics."""
    from quantlib.data import loading
    from quantlib.quantize import preparation, qat, stored

    model, header = stored.open_model(job.store.read(before))
    if header.state == "fused":
        model = preparation.prepare_qat(model, scheme, inplace=True)
        header = replace(header, scheme=scheme, int8_layers=tuple(preparation.int8_layers(model)))
    split, indices = loading.select(images)
    taught_by = stored.open_model(job.store.read(teacher))[0] if teacher is not None else None
    metrics = qat.train_epoch(model, epoch, schedule, split, indices, transform, taught_by, job.progress)
    return job.store.put(header.kind, stored.hand_over(model, header)), job.store.put_json("metrics", metrics)


def has_stalled(run: Run, evaluations: Sequence[tuple[Ref, ...]], patience: int) -> bool:
    """Whether none of the last `patience` candidates was better than all before them.

    Not a stage: it reads the results of stages.

    Raises:
        NotYetKnownError: In a plan, if one of them has not been evaluated yet.
    """
    from quantlib.measure import predictions

    store = run.known(evaluations)
    top1 = [predictions.load_shards(map(store.read, parts)).top1 for parts in evaluations]
    return len(top1) - 1 - top1.index(max(top1)) >= patience


@stage("choose_epoch-{branch}")
def choose_epoch(
    job: Job,
    models: tuple[Ref, ...],
    files: tuple[Ref, ...],
    evaluations: tuple[tuple[Ref, ...], ...],
    *,
    branch: str,
) -> tuple[Ref, Ref, Ref]:
    """The candidate that is most accurate on the selection images; among equals, the first.

    The candidates are the start of QAT, if that is a calibrated model, and its epochs.

    Returns:
        Its quantized model, the file that it is judged by, and its place among the candidates.
    """
    from quantlib.measure import predictions

    store = job.store
    top1 = [predictions.load_shards(map(store.read, parts)).top1 for parts in evaluations]
    best = top1.index(max(top1))
    return models[best], files[best], job.store.put_json("choice", best)
