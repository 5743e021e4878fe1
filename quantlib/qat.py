"""Quantization-aware training, one resumable epoch at a time."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from quantlib import backend, calibration, data, images
from quantlib.data import Split
from quantlib.progress import Progress, silent
from quantlib.schedule import Schedule
from quantlib.transforms import Transform


@dataclass(frozen=True)
class EpochMetrics:
    """What an epoch of training showed, on its own training images."""

    epoch: int
    loss: float
    train_top1: float
    num_images: int
    observers_frozen: bool
    batch_norm_frozen: bool


class QATState:
    """A model in quantization-aware training, and its optimizer.

    Args:
        model: Prepared in mode "qat".
        header: How to build it again; see `models.save`.
        learning_rate: Of plain SGD.
    """

    def __init__(self, model: nn.Module, header: dict[str, Any], learning_rate: float) -> None:
        self.model = model
        self.header = header
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)

    def save(self) -> bytes:
        """The state as bytes, from which `load` goes on as if nothing had happened."""
        buffer = io.BytesIO()
        optimizer = self.optimizer.state_dict()
        torch.save({"header": self.header, "state": self.model.state_dict(), "optimizer": optimizer}, buffer)
        return buffer.getvalue()


def load(content: bytes, qconfig: str, learning_rate: float) -> QATState:
    """The state that an epoch left, or the one before the first epoch, from a model fused in mode "qat".

    BatchNorm's freeze is in no state_dict: `train_epoch` sets it again.
    """
    model, header = calibration.load_or_prepare(content, qconfig)
    state = QATState(model, header, learning_rate)
    optimizer = torch.load(io.BytesIO(content), weights_only=True).get("optimizer")
    if optimizer is not None:
        state.optimizer.load_state_dict(optimizer)
    return state


def train_epoch(
    state: QATState,
    epoch: int,
    schedule: Schedule,
    split: Split,
    indices: np.ndarray,
    transform: Transform,
    progress: Progress = silent,
) -> EpochMetrics:
    """Train one epoch in place; a function of the state and the epoch's number alone.

    Args:
        state: As the epoch before left it.
        epoch: 0-based.
        schedule: Batches, learning rate and freezes.
        split: The training images.
        indices: Those of them to train on, [n] int64.
        transform: Applied to each image.
        progress: Called with (batches done, batches in all).

    Returns:
        Loss and top-1 over the epoch's training images, and what is frozen now.
    """
    seed = schedule.seed + epoch
    torch.manual_seed(seed)
    order = indices[data.shuffled(len(indices), seed)]
    if schedule.batches_per_epoch is not None:
        order = order[: schedule.batches_per_epoch * schedule.batch_size]
    if len(order) % schedule.batch_size == 1:
        order = order[:-1]  # BatchNorm cannot train on a batch of one image.
    num_batches = -(-len(order) // schedule.batch_size)

    model = state.model.train().to(memory_format=torch.channels_last)
    if schedule.freezes_batch_norm(epoch - 1):
        backend.freeze_batch_norm(model)
    total_loss, correct = 0.0, 0
    for step, (pixels, labels_array) in enumerate(data.batches(split, order, transform, seed, schedule.batch_size)):
        labels = torch.from_numpy(labels_array)
        logits = model(images.to_input(torch.from_numpy(pixels)))
        loss = nn.functional.cross_entropy(logits, labels)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        total_loss += float(loss.detach()) * len(labels)
        correct += int((logits.argmax(1) == labels).sum())
        progress(step + 1, num_batches)
    if schedule.freezes_observers(epoch):
        backend.freeze_observers(model)
    if schedule.freezes_batch_norm(epoch):
        backend.freeze_batch_norm(model)
    return EpochMetrics(
        epoch=epoch,
        loss=total_loss / len(order),
        train_top1=correct / len(order),
        num_images=len(order),
        observers_frozen=schedule.freezes_observers(epoch),
        batch_norm_frozen=schedule.freezes_batch_norm(epoch),
    )
