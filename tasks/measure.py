"""Stages that measure: evaluate_baseline, evaluate, simulate, measure_layers, benchmark, pick_examples."""

from dataclasses import dataclass
from typing import Literal

from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.caching import stage
from tasks.run import current_run


@dataclass(frozen=True)
class Contender:
    """A variant's file in a runtime."""

    artifact: Ref
    runtime: Runtime


@stage("evaluate_baseline-{branch}")
def evaluate_baseline(artifact: Ref, images: Ref, batch_size: int, *, branch: str) -> Ref:
    """The float model's predictions, that every variant is compared with."""
    from quantlib.measure import evaluation, predictions

    run = current_run()
    file, shard = run.store.path(artifact), run.store.path(images)
    answers = evaluation.evaluate_file(file, "torchscript", shard, batch_size, run.progress)
    return run.store.put("predictions", predictions.save(answers))


@stage("evaluate-{branch}")
def evaluate(artifact: Ref, images: Ref, batch_size: int, runtime: Runtime, *, branch: str) -> Ref:
    """An int8 model's predictions, from the file that is shipped."""
    from quantlib.measure import evaluation, predictions

    run = current_run()
    file, shard = run.store.path(artifact), run.store.path(images)
    answers = evaluation.evaluate_file(file, runtime.name, shard, batch_size, run.progress)
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
    from quantlib.measure import evaluation, predictions
    from quantlib.quantize import simulation

    run = current_run()
    model = simulation.load(run.store.read(prepared), parts)
    answers = evaluation.evaluate(model, run.store.path(images), batch_size, run.progress)
    return run.store.put("predictions", predictions.save(answers))


@stage("measure_layers-{branch}")
def measure_layers(fused: Ref, prepared: Ref, images: Ref, start: int, stop: int, *, branch: str) -> Ref:
    """What each layer of a calibrated model, or of an epoch's state, costs on some images of a shard."""
    from quantlib.graph import fusion
    from quantlib.measure import sensitivity
    from quantlib.quantize import calibration

    run = current_run()
    reference, _ = fusion.load(run.store.read(fused))
    model, header = calibration.load_prepared(run.store.read(prepared))
    shard = run.store.path(images)
    sums = sensitivity.measure_layers(reference, model, header["fused"], shard, start, stop, run.progress)
    return run.store.put_json("layers", sums)


@stage("benchmark")
def benchmark(
    contenders: tuple[Contender, ...],
    images: Ref,
    cpu: str,  # In the key: another CPU is another measurement.
    batch_sizes: tuple[int, ...],
    num_threads: tuple[int, ...],
    num_samples: int,
) -> Ref:
    """Time the files of all variants in every runtime, in turn."""
    from quantlib.data import shards
    from quantlib.measure import benchmark as timer
    from quantlib.runtimes import classifiers

    run = current_run()
    pixels, _ = shards.open_shard(run.store.path(images))
    files = [(run.store.path(entry.artifact), entry.runtime.name) for entry in contenders]
    timings = timer.time_models(
        lambda threads: [classifiers.open_model(path, runtime, threads) for path, runtime in files],
        shards.to_input(pixels[: max(batch_sizes)]),
        batch_sizes,
        num_threads,
        num_samples,
        run.progress,
    )
    return run.store.put_json("timings", timings)


@stage("pick_examples")
def pick_examples(
    images: tuple[Ref, ...],
    baseline: tuple[Ref, ...],
    variants: tuple[tuple[str, tuple[Ref, ...]], ...],
    num_examples: int,
) -> Ref:
    """Images that variants answer otherwise than float, as small pictures.

    A variant is its name and its answers.
    """
    from quantlib.data import shards
    from quantlib.measure import examples, predictions

    run = current_run()
    pixels = [shards.open_shard(run.store.path(ref))[0] for ref in images]

    def answers(refs: tuple[Ref, ...]) -> predictions.Predictions:
        return predictions.concatenate([predictions.load(run.store.read(ref)) for ref in refs])

    before, found = answers(baseline), []
    for name, refs in variants:
        found += examples.pick(name, before, answers(refs), pixels, num_examples)
    return run.store.put("examples", examples.save(found))
