"""Fusing modules in eager mode."""

from torch import nn
from torch.ao import quantization as tq

from quantlib.recipe.scheme import FuseMode


def fuse_modules(model: nn.Module, groups: list[list[str]], mode: FuseMode) -> None:
    """Fuse each group of submodules (Conv, BatchNorm, ReLU; named by dotted path) in place.

    In mode "eval" BatchNorm is folded into the convolution; in mode "qat" it stays live inside a fused module.
    """
    if not groups:
        return
    if mode == "qat":
        tq.fuse_modules_qat(model.train(), groups, inplace=True)
    else:
        tq.fuse_modules(model.eval(), groups, inplace=True)
