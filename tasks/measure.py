"""Stages that measure: evaluate_baseline, evaluate, simulate, measure_layers, benchmark."""

from typing import Literal

from quantlib.store import Ref
from tasks.caching import stage
from tasks.run import current_run


@stage("evaluate_baseline-{branch}")
def evaluate_baseline(artifact: Ref, images: Ref, batch_size: int, *, branch: str) -> Ref:
    """The float model's predictions, that every variant is compared with."""
    from quantlib import evaluation, export, predictions

    run = current_run()
    model = export.load(run.store.path(artifact))
    answers = evaluation.evaluate(model, run.store.path(images), batch_size, run.progress)
    return run.store.put("predictions", predictions.save(answers))


@stage("evaluate-{branch}")
def evaluate(artifact: Ref, images: Ref, batch_size: int, engine: str, *, branch: str) -> Ref:
    """An int8 model's predictions, from the file that is shipped."""
    from quantlib import backend, evaluation, export, predictions

    run = current_run()
    with backend.use_engine(engine):
        model = export.load(run.store.path(artifact))
        answers = evaluation.evaluate(model, run.store.path(images), batch_size, run.progress)
    return run.store.put("predictions", predictions.save(answers))


@stage("simulate-{branch}-{parts}")
def simulate(
    prepared: Ref,
    images: Ref,
    batch_size: int,
    parts: Literal["both", "weights", "activations"],
    *,
    branch: str,
) -> Ref:
    """Predictions of the float model with fake quantization of weights, activations or both."""
    from quantlib import evaluation, predictions, simulation

    run = current_run()
    model = simulation.load(run.store.read(prepared), parts)
    answers = evaluation.evaluate(model, run.store.path(images), batch_size, run.progress)
    return run.store.put("predictions", predictions.save(answers))


@stage("measure_layers-{branch}")
def measure_layers(fused: Ref, prepared: Ref, images: Ref, start: int, stop: int, *, branch: str) -> Ref:
    """What each layer of a calibrated model, or of an epoch's state, costs on some images of a shard."""
    from quantlib import calibration, fusion, layers

    run = current_run()
    reference, _ = fusion.load(run.store.read(fused))
    model, header = calibration.load_prepared(run.store.read(prepared))
    shard = run.store.path(images)
    sums = layers.measure_layers(reference, model, header["fused"], shard, start, stop, run.progress)
    return run.store.put_json("layers", sums)


@stage("benchmark")
def benchmark(
    artifacts: tuple[Ref, ...],
    images: Ref,
    engine: str,
    cpu: str,  # In the key: another CPU is another measurement.
    batch_sizes: tuple[int, ...],
    num_threads: tuple[int, ...],
    num_samples: int,
) -> Ref:
    """Time the files of all variants in turn."""
    from quantlib import backend, export
    from quantlib import benchmark as timer
    from quantlib import images as shards

    run = current_run()
    pixels, _ = shards.open_shard(run.store.path(images))
    inputs = shards.to_input(pixels[: max(batch_sizes)])
    with backend.use_engine(engine):
        models = [export.load(run.store.path(ref)) for ref in artifacts]
        timings = timer.time_models(models, inputs, batch_sizes, num_threads, num_samples, run.progress)
    return run.store.put_json("timings", timings)
