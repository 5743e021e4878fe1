"""Evaluation: a model's predictions for the images of a shard."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlib.data import shards
from quantlib.data.feeding import feed
from quantlib.measure.predictions import Predictions, concatenate
from quantlib.progress import Progress, silent
from quantlib.recipe.interface import FLOAT, Interface
from quantlib.runtimes import classifiers

# A model gets one shard after another, and its file never changes: the store names it by its content. Two, as float and
# a variant take turns where evaluation may stop.
_open_model = functools.lru_cache(maxsize=2)(classifiers.open_model)


def evaluate_file(
    artifact: Path,
    runtime: str,
    shard: Path,
    batch_size: int,
    progress: Progress = silent,
    interface: Interface = FLOAT,
) -> Predictions:
    """Run `evaluate` on an exported model in a runtime, both as `classifiers.open_model` takes them.

    Raises:
        ModelError: If the file cannot be read, or is not for that runtime.
        MachineError: If the runtime is not installed, or this machine lacks its engine.
    """
    return evaluate(_open_model(artifact, runtime), shard, batch_size, progress, interface)


def evaluate(
    model: Callable[[Tensor], Tensor],
    shard: Path,
    batch_size: int,
    progress: Progress = silent,
    interface: Interface = FLOAT,
) -> Predictions:
    """Predictions for every image.

    Args:
        model: Images to logits or probabilities, [n, num_classes] float32, in eval mode.
        shard: A file of decoded images.
        batch_size: Images per forward pass.
        progress: Called with (images done, images in all).
        interface: What the model takes and gives.
    """
    images, done, parts = shards.open_shard(shard), 0, []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            some = slice(start, start + batch_size)
            scores, labels = model(feed(images.pixels[some], images.normalization, interface)), images.labels[some]
            # Logits are probabilities' logarithms, but for a constant.
            logits = scores.clamp_min(torch.finfo().tiny).log() if interface.softmax else scores  # (n, num_classes)
            loss = nn.functional.cross_entropy(logits, labels, reduction="none")
            # int8 logits often tie. Ties go to the lower class, as with argmax; topk picks either.
            ranked = scores.sort(dim=1, descending=True, stable=True).indices  # (n, num_classes)
            # A copy: a view would keep the rank of every class alive, in between large tensors in memory.
            top5 = ranked[:, :5].contiguous()
            parts.append(Predictions(labels.numpy(), top5.numpy(), loss.numpy()))
            done += len(labels)
            progress(done, len(images))
    return concatenate(parts)
