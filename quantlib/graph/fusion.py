"""Fusion: BatchNorm becomes part of the convolution before it, which int8 needs and float benefits from."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from quantlib.graph.nodes import module_of
from quantlib.recipe.scheme import FuseMode

M = TypeVar("M", bound=nn.Module)


def recast(layer: nn.Module, kind: type[M], **modules: nn.Module) -> M:
    """A layer with the same parameters and settings, of another class and with other submodules."""
    own = kind.__new__(kind)
    # Not by its constructor, which would draw initial weights.
    own.__dict__.update(layer.__dict__)
    own._parameters, own._modules = dict(layer._parameters), dict(modules)
    return own


class ConvBatchNorm2d(nn.Conv2d):
    """A convolution and the BatchNorm after it, for training."""

    bn: nn.BatchNorm2d
    weight_quantizer: nn.Module
    """Rounds the weight, with BatchNorm folded in."""

    @classmethod
    def of(cls, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> ConvBatchNorm2d:
        """Take over the parameters of two modules."""
        return recast(convolution, cls, bn=norm, weight_quantizer=nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """BatchNorm(conv(x)), with the weight rounded as it will be once BatchNorm is folded."""
        factor = (self.bn.weight / _deviation(self.bn)).view(-1, 1, 1, 1)
        # The weight is divided, not the output, which is a thousand times its size: half of the time of a step.
        weight = self.weight_quantizer(self.weight * factor) / torch.where(factor == 0, 1.0, factor)
        return self.bn(self._conv_forward(x, weight, self.bias))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with BatchNorm folded in, as it is now."""
        return fold(self.weight.detach(), self.bias, self.bn)


def fold(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [out, ...] and bias [out] of a convolution that does what it and the BatchNorm after it do."""
    assert norm.running_mean is not None
    scale = norm.weight.detach() / _deviation(norm)
    shift = -norm.running_mean if bias is None else bias.detach() - norm.running_mean
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift * scale + norm.bias.detach()


def _deviation(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return (norm.running_var + norm.eps).sqrt()


def fuse_model(traced: fx.GraphModule, mode: FuseMode, *, inplace: bool = False) -> fx.GraphModule:
    """Fuse a float model, or a copy of it.

    Args:
        traced: As `graph.model` makes it.
        mode: "eval" folds BatchNorm into the convolution, for inference and PTQ; "qat" keeps it live, so that
            it can be trained, then frozen.
        inplace: Fuse the model itself, not a copy.
    """
    fused = traced if inplace else copy.deepcopy(traced)
    calls = Counter(str(node.target) for node in fused.graph.nodes if node.op == "call_module")
    for node in list(fused.graph.nodes):
        before = _convolution_before(fused, node, calls)
        if before is None:
            continue
        path, norm_path = str(before.target), str(node.target)
        convolution: Any = fused.get_submodule(path)
        norm: Any = fused.get_submodule(norm_path)
        if mode == "qat":
            fused.set_submodule(path, ConvBatchNorm2d.of(convolution, norm))
        else:
            weight, bias = fold(convolution.weight.detach(), convolution.bias, norm)
            convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
        node.replace_all_uses_with(before)
        fused.graph.erase_node(node)
        # What else its module holds, such as an activation, stays where it is.
        rest = nn.Module()
        for name, child in norm.named_children():
            rest.add_module(name, child)
        fused.set_submodule(norm_path, rest)
    fused.delete_all_unused_submodules()
    fused.recompile()
    return fused.train(mode == "qat")


def _convolution_before(traced: fx.GraphModule, node: fx.Node, calls: Counter[str]) -> fx.Node | None:
    """The call of the convolution that a BatchNorm's call becomes part of."""
    if node.op != "call_module" or calls[str(node.target)] > 1:
        return None
    norm = traced.get_submodule(str(node.target))
    before = node.all_input_nodes[0]
    if type(norm) is not nn.BatchNorm2d or not norm.affine or norm.running_var is None or len(before.users) > 1:
        return None
    convolution = module_of(traced, before)
    folds = type(convolution) is nn.Conv2d and calls[str(before.target)] == 1
    return before if folds else None


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep BatchNorm's statistics as they are until the model is put into training mode again."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
