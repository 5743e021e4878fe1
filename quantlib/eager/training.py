"""Training a prepared model in eager mode."""

from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import qat as intrinsic_qat


def use_fast_forward(prepared: nn.Module) -> None:
    """Make a model's fused modules compute what torch's do in training, in less time; in place.

    None of this is in a state_dict.
    """
    for module in prepared.modules():
        if isinstance(module, intrinsic_qat.ConvBn2d):
            replaced: Any = module
            replaced._forward_approximate = MethodType(_forward_conv_bn, module)
            quantize = replaced.activation_post_process
            if isinstance(module, intrinsic_qat.ConvBnReLU2d) and hasattr(quantize, "fuses_relu"):
                quantize.fuses_relu = True
                replaced.forward = MethodType(_forward_conv_bn_relu, module)


def _forward_conv_bn(conv_bn: Any, x: torch.Tensor) -> torch.Tensor:
    """What torch's fused Conv and BatchNorm compute in training: conv(x, fake_quant(w s)) / s, then BatchNorm.

    torch divides the convolution's output by s, the scale that folding BatchNorm will give to the weights; here the
    weights are divided, which are a thousandth of the size. Dividing the output, there and in the gradient, took
    half the time of a training step.
    """
    norm = conv_bn.bn
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    weight = conv_bn.weight_fake_quant(conv_bn.weight * scale) / scale
    return norm(conv_bn._conv_forward(x, weight, conv_bn.bias))


def _forward_conv_bn_relu(conv_bn_relu: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of torch, without the ReLU if the fake quantization after it does what a ReLU does."""
    y = conv_bn_relu._forward(x)
    return y if getattr(conv_bn_relu.activation_post_process, "fuses_relu", False) else nn.functional.relu(y)


def set_range(fake_quantize: Any, observer: Any) -> None:
    """Give fake quantization the grid that an observer has found, and start its moving average from that range."""
    scale, zero_point = observer.calculate_qparams()
    low = (observer.quant_min - zero_point) * scale
    high = (observer.quant_max - zero_point) * scale
    own = fake_quantize.activation_post_process
    own.min_val.resize_(()).copy_(low.squeeze())
    own.max_val.resize_(()).copy_(high.squeeze())
    fake_quantize.scale.resize_(scale.shape).copy_(scale)
    fake_quantize.zero_point.resize_(zero_point.shape).copy_(zero_point)


def set_bias(module: Any, bias: torch.Tensor) -> None:
    """Set the bias [C] of a layer in training; of a fused one, through its BatchNorm, as it is once that is folded."""
    norm = getattr(module, "bn", None)
    if norm is None:
        module.bias.data.copy_(bias)
        return
    inside = 0.0 if module.bias is None else module.bias.detach()
    folded = (inside - norm.running_mean) * norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    norm.bias.data.copy_(bias - folded)


def observe_weights(model: nn.Module) -> None:
    """Find the grid of each weight of a model in training, with BatchNorm folded in as it is now."""
    for module in model.modules():
        weight_fake_quant = getattr(module, "weight_fake_quant", None)
        if weight_fake_quant is not None:
            weight = cast("Any", module).weight.detach()
            norm = getattr(module, "bn", None)
            if norm is not None:
                factor = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
                weight = weight * factor.view(-1, *[1] * (weight.dim() - 1))
            weight_fake_quant(weight)


def freeze_observers(model: nn.Module) -> None:
    """Keep scales and zero points as they are from now on."""
    model.apply(tq.disable_observer)


def freeze_batch_norm(model: nn.Module) -> None:
    """Keep BatchNorm's statistics as they are from now on, inside fused QAT modules and on its own.

    This sets attributes that no state_dict holds: whoever loads a model, or puts it into training mode, must freeze it
    again.
    """
    inside = {id(module.bn) for module in model.modules() if hasattr(module, "freeze_bn_stats")}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and id(module) not in inside:
            module.eval()
    model.apply(intrinsic_qat.freeze_bn_stats)
