"""Benchmark: times models in rounds, one call of each, so that a change in the machine's speed affects all alike.

The order within each round is random, because what ran before matters: in a fixed order, the same file opened twice
differed by up to a quarter, always with the same sign, where it followed another runtime.

One image on one thread is what models are ranked by: it is timed until the order is certain. Other settings are only
reported.
"""

import functools
import random
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.measure import ranking
from quantlib.progress import Progress, silent
from quantlib.runtimes.classifiers import Classifier

# Frozen models need two calls to choose their kernels and allocate their memory.
_NUM_WARM_UP = 2
# Enough for a median; whether the order is certain is asked after these, and then after every few more.
_LEAST, _MORE = 10, 5
# A slow model stops here, once it has the least number of samples.
_MAX_SECONDS = 2.0
# The same for a setting that nothing is ranked by, and enough for its 95th percentile.
_LEAST_REPORTED, _MOST_REPORTED, _MAX_SECONDS_REPORTED = 2, 20, 1.0
# A call that takes longer gains too little from an untimed one before it.
_LONG_CALL_SECONDS = 0.1


@dataclass(frozen=True)
class Timing:
    """How long one model took for one batch size and number of threads."""

    model: int
    """Its place among the models that were timed."""
    batch_size: int
    num_threads: int
    samples_ms: tuple[float, ...]
    """Each call's wall-clock time in milliseconds, by round: samples at one index were taken one after the other."""


def time_models(
    open_models: Callable[[int], Sequence[Classifier]],
    inputs: Tensor,
    batch_sizes: Sequence[int],
    num_threads: Sequence[int],
    num_samples: int,
    progress: Progress = silent,
    files: Sequence[Hashable] | None = None,
) -> list[Timing]:
    """Time every model with every number of threads and batch size.

    Args:
        open_models: Returns the models, opened for a number of threads.
        inputs: [N, ...], as the models take them; repeated to fill a larger batch. Each gets them in the memory layout
            that it prefers.
        batch_sizes: Images per call.
        num_threads: Threads of torch and of the models' own runtimes.
        num_samples: Most timed calls per model and setting.
        progress: Called with (settings done, settings in all).
        files: The file that each model is, as in `ranking.is_order_certain`; None: each is one of its own.
    """
    settings = [(threads, batch_size) for threads in num_threads for batch_size in batch_sizes]
    threads_before = torch.get_num_threads()
    timings: list[Timing] = []
    try:
        for done, (threads, batch_size) in enumerate(settings):
            progress(done, len(settings))
            torch.set_num_threads(threads)
            if batch_size == batch_sizes[0]:
                models = open_models(threads)
            repeats = -(-batch_size // len(inputs))
            batch = inputs.repeat(repeats, 1, 1, 1)[:batch_size]
            if (batch_size, threads) == ranking.SETTING:
                is_enough = functools.partial(ranking.is_order_certain, files=files or range(len(models)))
                samples = _time_in_turn(models, batch, num_samples, is_enough)
            else:
                samples = _time_in_turn(models, batch, min(num_samples, _MOST_REPORTED))
            timings += [Timing(n, batch_size, threads, tuple(ms)) for n, ms in enumerate(samples)]
    finally:
        torch.set_num_threads(threads_before)
    progress(len(settings), len(settings))
    return timings


def _time_in_turn(
    models: Sequence[Classifier],
    batch: Tensor,
    num_samples: int,
    is_enough: Callable[[Sequence[Sequence[float]]], bool] | None = None,
) -> list[list[float]]:
    """Milliseconds of each model's call in each round; without `is_enough`, nothing is ranked by them."""
    samples: list[list[float]] = [[] for _ in models]
    batches = [model.arrange(batch) for model in models]
    long = []
    for model, own in zip(models, batches, strict=True):
        for _ in range(_NUM_WARM_UP):
            seconds = _seconds(model, own)
        long.append(seconds > _LONG_CALL_SECONDS)
    least, most_seconds = (_LEAST, _MAX_SECONDS) if is_enough else (_LEAST_REPORTED, _MAX_SECONDS_REPORTED)
    deadline = time.perf_counter() + most_seconds * len(models)
    order = random.Random(0)  # The same in every run, so that runs differ only by the machine.
    for number in range(num_samples):
        if number >= least and time.perf_counter() >= deadline:
            break
        if is_enough is not None and number >= least and number % _MORE == 0 and is_enough(samples):
            break
        turns = list(zip(models, batches, samples, long, strict=True))
        order.shuffle(turns)
        for model, own, times, is_long in turns:
            if not is_long:
                # Untimed: it brings weights into the caches, as on a server, and outlasts the previous runtime's
                # threads, which spin for a while.
                model(own)
            times.append(_seconds(model, own) * 1000)
    return samples


def _seconds(model: Classifier, batch: Tensor) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    model(batch)
    return time.perf_counter() - start
