"""The schedule of quantization-aware training."""

import math
from dataclasses import dataclass
from typing import Literal

LearningRateDecay = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """What is trained in each epoch, and when statistics are frozen."""

    batches_per_epoch: int | None
    """None: all of the training images."""
    batch_size: int
    epochs: int | None
    """Epochs that the decay spans; None without decay, when an epoch is the same however many there are."""
    learning_rate: float
    """Initial learning rate."""
    decay: LearningRateDecay
    """cosine: to zero at the last epoch's end (Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5)."""
    freeze_batch_norm_after_epoch: int
    """BatchNorm is frozen at the end of every epoch (counted from 0) above this one."""
    freeze_observer_after_epoch: int
    """Observers are frozen at the end of every epoch (counted from 0) above this one."""
    seed: int
    """Seeds data order, crops and dropout, together with the epoch's number."""

    def learning_rate_at(self, epoch: int, progress: float) -> float:
        """The learning rate of a step.

        Args:
            epoch: 0-based.
            progress: Fraction of the epoch's steps that are done, in [0, 1).
        """
        if self.decay == "constant" or self.epochs is None:
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (epoch + progress) / self.epochs)) / 2

    def freezes_batch_norm(self, epoch: int) -> bool:
        """Whether BatchNorm is frozen once this epoch is trained."""
        return epoch > self.freeze_batch_norm_after_epoch

    def freezes_observers(self, epoch: int) -> bool:
        """Whether observers are frozen once this epoch is trained."""
        return epoch > self.freeze_observer_after_epoch
