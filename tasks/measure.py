"""Stages that measure: evaluate_baseline, evaluate, simulate, measure_layers, benchmark, pick_examples."""

from typing import Literal

from quantlib.recipe.interface import Interface
from quantlib.runtimes.available import Runtime
from quantlib.store.artifacts import Ref
from tasks.refs import BenchmarkTarget
from tasks.stage import Job, stage

Rounded = Literal["both", "weights", "activations"]
"""What a simulation rounds."""


@stage("evaluate_baseline-{branch}")
def evaluate_baseline(
    job: Job, artifact: Ref, images: Ref, batch_size: int, runtime: Runtime, interface: Interface, *, branch: str
) -> Ref:
    """The float model's predictions, which every variant is compared with."""
    from quantlib.measure import evaluation, predictions

    file, shard = job.store.path(artifact), job.store.path(images)
    answers = evaluation.evaluate_file(file, runtime.name, shard, batch_size, job.progress, interface)
    return job.store.put("predictions", predictions.save(answers))


@stage("evaluate-{branch}")
def evaluate(
    job: Job, artifact: Ref, images: Ref, batch_size: int, runtime: Runtime, interface: Interface, *, branch: str
) -> Ref:
    """An int8 model's predictions, from the file to ship."""
    from quantlib.measure import evaluation, predictions

    file, shard = job.store.path(artifact), job.store.path(images)
    answers = evaluation.evaluate_file(file, runtime.name, shard, batch_size, job.progress, interface)
    return job.store.put("predictions", predictions.save(answers))


@stage("simulate-{branch}-{parts}")
def simulate(
    job: Job,
    model: Ref,
    images: Ref,
    batch_size: int,
    parts: Rounded,
    *,
    branch: str,
) -> Ref:
    """Predictions of a quantized model that rounds weights, activations or both, in float."""
    from quantlib.measure import evaluation, predictions
    from quantlib.quantize import simulation, stored

    module, _ = stored.open_model(job.store.read(model))
    simulated = simulation.simulate(module, parts)
    answers = evaluation.evaluate(simulated, job.store.path(images), batch_size, job.progress)
    return job.store.put("predictions", predictions.save(answers))


@stage("measure_layers-{branch}")
def measure_layers(job: Job, fused: Ref, model: Ref, images: Ref, start: int, stop: int, *, branch: str) -> Ref:
    """What each layer of a quantized model costs, on some images of a shard."""
    from quantlib.measure import sensitivity
    from quantlib.quantize import stored

    reference, _ = stored.open_model(job.store.read(fused))
    module, _ = stored.open_model(job.store.read(model))
    shard = job.store.path(images)
    sums = sensitivity.measure_layers(reference, module, shard, start, stop, job.progress)
    return job.store.put_json("layers", sums)


@stage("benchmark-{branch}", alone=True)
def benchmark(
    job: Job,
    targets: tuple[BenchmarkTarget, ...],
    images: Ref,
    cpu: str,  # Part of the key: another CPU is another measurement.
    batch_sizes: tuple[int, ...],
    num_threads: tuple[int, ...],
    num_samples: int,
    interface: Interface,
    *,
    branch: str,
) -> Ref:
    """Time files in runtimes, in turns: those of all variants, or those that the search chooses from."""
    from quantlib.data import shards
    from quantlib.data.feeding import feed
    from quantlib.measure import benchmark as timer
    from quantlib.runtimes import classifiers

    shard = shards.open_shard(job.store.path(images))
    files = [(job.store.path(target.artifact), target.runtime.name) for target in targets]
    timings = timer.time_models(
        lambda threads: [classifiers.open_model(path, runtime, threads) for path, runtime in files],
        feed(shard.pixels[: max(batch_sizes)], shard.normalization, interface),
        batch_sizes,
        num_threads,
        num_samples,
        job.progress,
        [target.artifact.sha256 for target in targets],
    )
    return job.store.put_json("timings", timings)


@stage("pick_examples")
def pick_examples(
    job: Job,
    images: tuple[Ref, ...],
    baseline: tuple[Ref, ...],
    variants: tuple[tuple[str, tuple[Ref, ...]], ...],
    num_examples: int,
) -> Ref:
    """Small pictures of images that variants answer differently from float.

    A variant is given as its name and its answers.
    """
    from quantlib.data import shards
    from quantlib.measure import examples, predictions

    pixels = [shards.open_shard(job.store.path(ref)).pixels for ref in images]

    def answers(refs: tuple[Ref, ...]) -> predictions.Predictions:
        return predictions.load_shards(map(job.store.read, refs))

    before, found = answers(baseline), []
    for name, refs in variants:
        after = answers(refs)
        found += examples.pick(name, before.first(len(after)), after, pixels, num_examples)
    return job.store.put("examples", examples.save(found))
