"""How pixels become numbers: each channel's mean and deviation, which a model was trained with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return len(self.mean)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What every torchvision model is trained with."""
