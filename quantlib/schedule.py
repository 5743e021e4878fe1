"""When quantization-aware training does what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What is trained in each epoch, and when statistics are frozen."""

    batches_per_epoch: int | None
    """None: all of the training images."""
    batch_size: int
    learning_rate: float
    freeze_batch_norm_after_epoch: int
    """Frozen at the end of each 0-based epoch whose number is greater."""
    freeze_observer_after_epoch: int
    """Likewise, the observers."""
    seed: int
    """Of data order, crops and dropout, together with the epoch's number."""

    def freezes_batch_norm(self, epoch: int) -> bool:
        """Whether BatchNorm is frozen once this epoch is trained."""
        return epoch > self.freeze_batch_norm_after_epoch

    def freezes_observers(self, epoch: int) -> bool:
        """Whether observers are frozen once this epoch is trained."""
        return epoch > self.freeze_observer_after_epoch
