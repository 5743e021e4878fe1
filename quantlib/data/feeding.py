"""Images as an exported file takes them."""

from torch import Tensor

from quantlib.data.normalization import Normalization
from quantlib.data.shards import to_input
from quantlib.recipe.interface import Interface


def feed(pixels: Tensor, normalization: Normalization, interface: Interface) -> Tensor:
    """Pixels [N, H, W, C] uint8 to the input of a file.

    Returns:
        [N, C, H, W] float32, normalized; or the pixels, [N, C, H, W] or [N, H, W, C] uint8.
    """
    if interface.input == "float":
        return to_input(pixels, normalization)
    return pixels if interface.layout == "nhwc" else pixels.permute(0, 3, 1, 2)
