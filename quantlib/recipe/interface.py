"""What an exported file takes and gives."""

from dataclasses import dataclass
from typing import Literal

InputKind = Literal["float", "uint8"]
Layout = Literal["nchw", "nhwc"]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The two ends of an exported file."""

    input: InputKind = "float"
    """float: normalized float32 images; uint8: the pixels of the crop, which the file normalizes itself."""
    layout: Layout = "nchw"
    """Order of the input's dimensions; float images are always nchw."""
    softmax: bool = False
    """Whether the file gives probabilities instead of logits."""


FLOAT = Interface()
"""Normalized images in, logits out, as the model itself."""
