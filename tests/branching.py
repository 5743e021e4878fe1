"""Modules that cannot be traced: they branch on values."""

import torch
from torch import Tensor, nn


class Branching(nn.Module):
    """A convolution, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images of eight channels."""
        return self.conv(x) if x.sum() > 0 else x


class BranchingClassifier(nn.Module):
    """A convolution and a linear layer, or nothing: three answers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images of three channels."""
        return self.last(self.first(x).relu().mean([2, 3])) if x.mean() < 100 else x.mean([2, 3])
