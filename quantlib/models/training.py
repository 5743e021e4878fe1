"""Training a float model from scratch, for datasets small enough to need no given weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from quantlib.data import loading, shards
from quantlib.data.images import Split
from quantlib.data.transforms import Transform
from quantlib.progress import Progress, silent

if TYPE_CHECKING:
    from quantlib.recipe.sections import TrainingRecipe


def train(
    model: nn.Module,
    split: Split,
    indices: np.ndarray,
    transform: Transform,
    recipe: TrainingRecipe,
    seed: int,
    progress: Progress = silent,
) -> None:
    """Train a model in place with SGD, and leave it in eval mode.

    Args:
        model: Its initial weights are the start.
        split: The training images.
        indices: Numbers of the images to train on, [n] int64.
        transform: Applied to each image, again in every epoch.
        recipe: Epochs; images per step (those left over at an epoch's end are dropped); and the peak learning rate of
            a one-cycle schedule (Smith and Topin 2018, arXiv:1708.07120).
        seed: Seeds data order, crops and dropout.
        progress: Called with (steps done, total steps).
    """
    batch_size, learning_rate, epochs = recipe.batch_size, recipe.learning_rate, recipe.epochs
    num_batches = max(1, len(indices) // batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=epochs * num_batches)
    model.train().to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    for epoch in range(epochs):
        order = indices[loading.shuffled(len(indices), seed + epoch)][: num_batches * batch_size]
        for step, (pixels, labels) in enumerate(loading.batches(split, order, transform, seed + epoch, batch_size)):
            logits = model(shards.to_input(torch.from_numpy(pixels), transform.normalization))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress(epoch * num_batches + step + 1, epochs * num_batches)
    model.eval().to(memory_format=torch.contiguous_format)
