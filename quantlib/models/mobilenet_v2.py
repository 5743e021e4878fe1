"""MobileNetV2, with ReLU where the paper has ReLU6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from quantlib.errors import ModelError

Setting = Sequence[int]


# Expansion, output channels, repeats, first stride: Sandler et al. 2018 (arXiv:1801.04381), table 2.
MOBILENET_V2_SETTINGS: tuple[Setting, ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def round_channels(channels: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `channels`, and never less than 90% of it."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU.

    ReLU where the paper has ReLU6: it fuses into the convolution, and int8 has an upper bound of its own.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                (kernel_size - 1) // 2,
                groups=groups,
                bias=False,
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise, project by 1x1; added to the input where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        if stride not in {1, 2}:
            raise ModelError(f"An inverted residual has stride {stride}: 1 and 2 are allowed.")
        hidden = round(in_channels * expansion)
        expand = [] if expansion == 1 else [ConvBNReLU(in_channels, hidden, kernel_size=1)]
        self.conv = nn.Sequential(
            *expand,
            ConvBNReLU(hidden, hidden, kernel_size=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381).

    Args:
        num_classes: Size of the last layer.
        width_mult: Multiplies every number of channels.
        inverted_residual_setting: Rows of (expansion, channels, repeats, stride); None for the paper's.
        round_nearest: Channels are rounded to multiples of this; 1 switches rounding off.

    Raises:
        ModelError: If an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Setting] | None = None,
        round_nearest: int = 8,
    ) -> None:
        super().__init__()
        settings = MOBILENET_V2_SETTINGS if inverted_residual_setting is None else inverted_residual_setting
        _check_arguments(num_classes, width_mult, settings, round_nearest)
        channels = round_channels(32 * width_mult, round_nearest)
        last_channels = round_channels(1280 * max(1.0, width_mult), round_nearest)
        features: list[nn.Module] = [ConvBNReLU(3, channels, kernel_size=3, stride=2)]
        for expansion, base_channels, repeats, first_stride in settings:
            out_channels = round_channels(base_channels * width_mult, round_nearest)
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                features.append(InvertedResidual(channels, out_channels, stride, expansion))
                channels = out_channels
        features.append(ConvBNReLU(channels, last_channels, kernel_size=1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last_channels, num_classes))
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] float32, normalized, to logits [N, num_classes]."""
        x = self.features(x)  # (N, last_channels, H / 32, W / 32)
        x = x.mean([2, 3])  # (N, last_channels)
        logits: Tensor = self.classifier(x)
        return logits


mobilenet_v2 = MobileNetV2


def _check_arguments(num_classes: Any, width_mult: Any, settings: Any, round_nearest: Any) -> None:
    """They come from the recipe, so each may be of any type."""
    if not isinstance(settings, Sequence) or not settings or not all(_is_setting(row) for row in settings):
        raise ModelError(
            f"inverted_residual_setting = {settings} is not allowed: give at least one row of four positive "
            "integers (expansion, channels, repeats, stride)."
        )
    counts_fit = all(isinstance(count, int) and count >= 1 for count in (num_classes, round_nearest))
    if not counts_fit or not isinstance(width_mult, int | float) or not 0 < width_mult < math.inf:
        raise ModelError(
            f"num_classes = {num_classes}, width_mult = {width_mult}, round_nearest = {round_nearest}: "
            "each must be a positive number, and the counts whole ones."
        )


def _is_setting(row: Any) -> bool:
    return isinstance(row, Sequence) and len(row) == 4 and all(isinstance(n, int) and n >= 1 for n in row)


def _initialize(module: nn.Module) -> None:
    # He et al. 2015 (arXiv:1502.01852), fan-out: keeps the gradients' variance through ReLU layers.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)
