"""Evaluation: a model's predictions for the images of a shard."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlib import images
from quantlib.predictions import Predictions, concatenate
from quantlib.progress import Progress, silent


def evaluate(
    model: Callable[[Tensor], Tensor],
    shard: Path,
    batch_size: int,
    progress: Progress = silent,
) -> Predictions:
    """Predictions for every image.

    Args:
        model: [n, 3, H, W] float32 to logits [n, num_classes], in eval mode.
        shard: A file of decoded images.
        batch_size: Images a forward pass.
        progress: Called with (images done, images in all).
    """
    total, done, parts = images.count(shard), 0, []
    with torch.inference_mode():
        for x, labels in images.batches(shard, batch_size):
            logits = model(x)  # (n, num_classes)
            loss = nn.functional.cross_entropy(logits, labels, reduction="none")
            # int8 logits often tie. Ties go to the lower class, as with argmax; topk gives them to either.
            top5 = logits.sort(dim=1, descending=True, stable=True).indices[:, :5]
            parts.append(Predictions(labels.numpy(), top5.numpy(), loss.numpy()))
            done += len(labels)
            progress(done, total)
    return concatenate(parts)
