"""Quantization-aware training, one resumable epoch at a time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quantlib.data import loading, shards
from quantlib.data.images import Split
from quantlib.data.transforms import Transform
from quantlib.graph.fusion import ConvBatchNorm2d, freeze_batch_norm
from quantlib.progress import Progress, silent
from quantlib.quantize import preparation
from quantlib.quantize.fake_quantization import freeze_observers
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.scheme import Scheme


@dataclass(frozen=True)
class EpochMetrics:
    """Results of one epoch of training, on its own training images."""

    epoch: int
    loss: float
    """Cross-entropy with the labels, or with `distill` Kullback-Leibler divergence from the teacher, in nats."""
    train_top1: float
    num_images: int
    observers_frozen: bool
    batch_norm_frozen: bool


def start_from(trainable: fx.GraphModule, calibrated: fx.GraphModule, scheme: Scheme) -> fx.GraphModule:
    """A model for training that computes what a calibrated one does once converted: same biases, ranges and grids.

    Args:
        trainable: Fused in mode "qat", from the same float model as `calibrated`.
        calibrated: Its biases may have been corrected.
        scheme: How both are quantized.

    Returns:
        A model prepared for training.
    """
    model = preparation.prepare_qat(trainable, scheme)
    for name, grid in preparation.quantizers(calibrated).items():
        preparation.quantizers(model)[name].start_from(grid)
    for path, module in calibrated.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            _set_bias(model.get_submodule(path), module.bias.detach())
    for path in preparation.int8_layers(model):
        layer: Any = model.get_submodule(path)
        # The first weight that it sees gives it its grid.
        layer.weight_quantizer(layer.folded()[0] if isinstance(layer, ConvBatchNorm2d) else layer.weight)
    return model


def _set_bias(layer: Any, bias: Tensor) -> None:
    """Set the bias [C] of a layer in training; of one with BatchNorm, as it is once that is folded."""
    if isinstance(layer, ConvBatchNorm2d):
        layer.bn.bias.data.add_(bias - layer.folded()[1])
    else:
        layer.bias.data.copy_(bias)


def train_epoch(
    model: nn.Module,
    epoch: int,
    schedule: Schedule,
    split: Split,
    indices: np.ndarray,
    transform: Transform,
    teacher: nn.Module | None = None,
    progress: Progress = silent,
) -> EpochMetrics:
    """Train one epoch in place; the result depends only on the model and the epoch's number.

    Args:
        model: Prepared for training, as the previous epoch left it. What is frozen is not in the state_dict, so it is
            set again here.
        epoch: 0-based.
        schedule: Batches, learning rate and freezes.
        split: The training images.
        indices: Which of them to train on, [n] int64.
        transform: Applied to each image.
        teacher: A float model whose logits are the target; None: the labels are.
        progress: Called with (batches done, batches in all).

    Returns:
        Loss and top-1 over the epoch's training images, and what is frozen now.
    """
    seed = schedule.seed + epoch
    torch.manual_seed(seed)
    order = _order(indices, schedule, seed)
    model.train().to(memory_format=torch.channels_last)
    _freeze(model, schedule, epoch - 1)
    num_batches, total_loss, correct = -(-len(order) // schedule.batch_size), 0.0, 0
    for step, (pixels, labels_array) in enumerate(loading.batches(split, order, transform, seed, schedule.batch_size)):
        labels = torch.from_numpy(labels_array)
        x = shards.to_input(torch.from_numpy(pixels), transform.normalization)
        learning_rate = schedule.learning_rate_at(epoch, step / num_batches)
        loss, num_right = _step(model, learning_rate, x, labels, teacher)
        total_loss += loss * len(labels)
        correct += num_right
        progress(step + 1, num_batches)
    _freeze(model, schedule, epoch)
    return EpochMetrics(
        epoch=epoch,
        loss=total_loss / len(order),
        train_top1=correct / len(order),
        num_images=len(order),
        observers_frozen=schedule.freezes_observers(epoch),
        batch_norm_frozen=schedule.freezes_batch_norm(epoch),
    )


def _step(
    model: nn.Module, learning_rate: float, x: Tensor, labels: Tensor, teacher: nn.Module | None
) -> tuple[float, int]:
    """Take a step on images x [n, 3, H, W] with labels [n]; returns the mean loss and how many images were right."""
    logits = model(x)
    loss = _loss(logits, labels, x, teacher)
    loss.backward()
    _descend(model, learning_rate)
    return float(loss.detach()), int((logits.argmax(1) == labels).sum())


@torch.no_grad()
def _descend(model: nn.Module, learning_rate: float) -> None:
    """Plain gradient descent, which keeps no state from step to step.

    torch.optim.SGD does the same, but first spends more than a second importing torch's compiler.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.add_(parameter.grad, alpha=-learning_rate)
            # Now, not before the next backward pass: in between the activations of the next forward pass, gradients
            # would keep the allocator from reusing its blocks, which took 0.4 of 4 GB.
            parameter.grad = None


def _freeze(model: nn.Module, schedule: Schedule, epoch: int) -> None:
    """Freeze whatever the schedule freezes after an epoch; -1: before the first."""
    if schedule.freezes_observers(epoch):
        freeze_observers(model)
    if schedule.freezes_batch_norm(epoch):
        freeze_batch_norm(model)


def _order(indices: np.ndarray, schedule: Schedule, seed: int) -> np.ndarray:
    """The epoch's training images in the order of their batches, [n] int64."""
    order = indices[loading.shuffled(len(indices), seed)]
    if schedule.batches_per_epoch is not None:
        order = order[: schedule.batches_per_epoch * schedule.batch_size]
    if len(order) % schedule.batch_size == 1:
        order = order[:-1]  # BatchNorm cannot train on a batch of one image.
    return order


def _loss(logits: Tensor, labels: Tensor, x: Tensor, teacher: nn.Module | None) -> Tensor:
    """How far logits [n, num_classes] are from the labels [n], or from what a teacher says about the images."""
    if teacher is None:
        return nn.functional.cross_entropy(logits, labels)
    with torch.no_grad():
        target = teacher(x).log_softmax(1)
    # Distillation at temperature 1, Hinton et al. 2015 (arXiv:1503.02531), section 2.
    return nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)
