"""Benchmark: models timed in turn, call by call, so that a change of the machine's speed meets each alike."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlib.progress import Progress, silent

# Enough for the memory allocator, the caches and TorchScript's profiling executor (two calls) to settle.
_NUM_WARM_UP = 5
# A slow model at a large batch stops here, once it has ten samples.
_MAX_SECONDS = 10.0


@dataclass(frozen=True)
class Timing:
    """How long one model took for one batch size and number of threads."""

    model: int
    """Its place among the models that were timed."""
    batch_size: int
    num_threads: int
    samples_ms: tuple[float, ...]
    """Each call's wall-clock time in milliseconds, in the order of the calls."""


def time_models(
    models: Sequence[nn.Module],
    inputs: Tensor,
    batch_sizes: Sequence[int],
    num_threads: Sequence[int],
    num_samples: int,
    progress: Progress = silent,
) -> list[Timing]:
    """Time every model with every batch size and number of threads.

    Args:
        models: In eval mode.
        inputs: [N, 3, H, W]; repeated to fill a batch that is larger.
        batch_sizes: Images a call.
        num_threads: Threads of torch.
        num_samples: Timed calls of each.
        progress: Called with (settings done, settings in all).
    """
    settings = [(batch_size, threads) for batch_size in batch_sizes for threads in num_threads]
    threads_before = torch.get_num_threads()
    timings: list[Timing] = []
    try:
        for done, (batch_size, threads) in enumerate(settings):
            progress(done, len(settings))
            torch.set_num_threads(threads)
            repeats = -(-batch_size // len(inputs))
            batch = inputs.repeat(repeats, 1, 1, 1)[:batch_size].contiguous(memory_format=torch.channels_last)
            samples = _time_in_turn(models, batch, num_samples)
            timings += [Timing(n, batch_size, threads, tuple(ms)) for n, ms in enumerate(samples)]
    finally:
        torch.set_num_threads(threads_before)
    progress(len(settings), len(settings))
    return timings


def _time_in_turn(models: Sequence[nn.Module], batch: Tensor, num_samples: int) -> list[list[float]]:
    """Milliseconds of each call of each model."""
    samples: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for model in models:
            for _ in range(_NUM_WARM_UP):
                model(batch)
        deadline = time.perf_counter() + _MAX_SECONDS * len(models)
        while len(samples[0]) < num_samples and (len(samples[0]) < 10 or time.perf_counter() < deadline):
            for model, times in zip(models, samples, strict=True):
                start = time.perf_counter()
                model(batch)
                times.append((time.perf_counter() - start) * 1000)
    return samples
