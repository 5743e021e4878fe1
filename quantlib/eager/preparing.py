"""Putting observers or fake quantization into a model in eager mode."""

import functools
from typing import Any

from torch import nn
from torch.ao import quantization as tq


def ptq_qconfig(activation: Any, per_channel: bool) -> Any:
    """A qconfig of observers.

    Args:
        activation: Makes the observer of each activation.
        per_channel: Whether weights have one scale per output channel, or one per tensor.
    """
    weight = tq.default_per_channel_weight_observer if per_channel else tq.default_weight_observer
    return _qconfig(activation, weight)


def qat_qconfig(activation: Any, weight: Any | None) -> Any:
    """A qconfig of fake quantization.

    Args:
        activation: Makes the fake quantization of each activation.
        weight: Makes that of each weight; None: torch's own, with one scale per tensor.
    """
    return _qconfig(activation, weight or tq.default_fused_wt_fake_quant)


def _qconfig(activation: Any, weight: Any) -> Any:
    # Plain functions: with torch's own kind of constructor, it makes a trial object for every module of the model,
    # which took half the time of preparing it.
    return tq.QConfig(activation=functools.partial(activation), weight=functools.partial(weight))


def prepare_ptq(model: nn.Module, qconfig: Any) -> nn.Module:
    """Put observers into a model fused in mode "eval", in place."""
    model.qconfig = qconfig
    return tq.prepare(model.eval(), inplace=True)


def prepare_qat(model: nn.Module, qconfig: Any) -> nn.Module:
    """Put fake quantization into a model fused in mode "qat", in place."""
    model.qconfig = qconfig
    return tq.prepare_qat(model.train(), inplace=True)
