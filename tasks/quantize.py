"""Stages that quantize: calibrate, convert, qat_epoch, choose_epoch."""

from quantlib.inputs import Selection
from quantlib.schedule import Schedule
from quantlib.store import Ref
from quantlib.transforms import Transform
from tasks.caching import stage
from tasks.run import current_run


@stage("calibrate-{branch}")
def calibrate(before: Ref, images: Ref, qconfig: str, batch_size: int, *, branch: str) -> Ref:
    """Show a shard of calibration images to the observers of a fused model, or of the shard before."""
    from quantlib import calibration, models

    run = current_run()
    prepared, header = calibration.load_or_prepare(run.store.read(before), qconfig)
    calibration.calibrate(prepared, run.store.path(images), batch_size, run.progress)
    return run.store.put("model", models.save(prepared, header))


@stage("convert-{branch}")
def convert(prepared: Ref, engine: str, crop: int, *, branch: str) -> Ref:
    """Make a calibrated model, or an epoch's state, int8."""
    from quantlib import calibration, conversion, models

    store = current_run().store
    module, header = calibration.load_prepared(store.read(prepared))
    int8 = conversion.convert(module, engine)
    conversion.check_int8(int8, engine, crop)
    return store.put("model", models.save(int8, header | {"engine": engine}))


@stage("qat_epoch-{branch}-{epoch}")
def qat_epoch(
    before: Ref,
    epoch: int,
    qconfig: str,
    schedule: Schedule,
    images: Selection,
    transform: Transform,
    *,
    branch: str,
) -> tuple[Ref, Ref]:
    """Train one epoch from the model fused for QAT, or from the epoch before; the new state, and its metrics."""
    from quantlib import data, qat

    run = current_run()
    state = qat.load(run.store.read(before), qconfig, schedule.learning_rate)
    split, indices = data.select(images)
    metrics = qat.train_epoch(state, epoch, schedule, split, indices, transform, run.progress)
    return run.store.put("model", state.save()), run.store.put_json("metrics", metrics)


@stage("choose_epoch-{branch}")
def choose_epoch(
    artifacts: tuple[Ref, ...],
    states: tuple[Ref, ...],
    evaluations: tuple[tuple[Ref, ...], ...],
    *,
    branch: str,
) -> tuple[Ref, Ref]:
    """The artifact and the state of the epoch that is most accurate on the images that choices are made by."""
    from quantlib import predictions

    store = current_run().store
    top1 = [predictions.concatenate([predictions.load(store.read(ref)) for ref in parts]).top1 for parts in evaluations]
    best = top1.index(max(top1))
    return artifacts[best], states[best]
