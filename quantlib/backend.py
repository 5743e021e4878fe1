"""The only importer of torch.ao.quantization: engines, qconfigs, prepare, convert.

PyTorch has announced the removal of eager-mode quantization; whatever replaces it is met here.
"""

import functools
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.ao import quantization as tq
from torch.ao.nn.intrinsic import qat as intrinsic_qat

from quantlib import machine
from quantlib.errors import MachineError

QuantStub = tq.QuantStub
DeQuantStub = tq.DeQuantStub
FloatFunctional = torch.ao.nn.quantized.FloatFunctional
FusedModule: Any = torch.ao.nn.intrinsic.ConvReLU2d.__mro__[1]
ObserverBase = tq.ObserverBase
MinMaxObserver = tq.MinMaxObserver
MovingAverageMinMaxObserver = tq.MovingAverageMinMaxObserver
HistogramObserver = tq.HistogramObserver
FakeQuantizeBase = tq.FakeQuantizeBase
# How much of a new range a MovingAverageMinMaxObserver takes in: its default.
AVERAGING_CONSTANT = 0.01
FusedMovingAvgObsFakeQuantize = tq.FusedMovingAvgObsFakeQuantize
MovingAveragePerChannelMinMaxObserver = tq.MovingAveragePerChannelMinMaxObserver

FuseMode = Literal["eval", "qat"]

EXPECTED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Eager-mode quantization and TorchScript are announced for removal; torch is pinned below the release that drops
    # them.
    ("torch.ao.quantization is deprecated", DeprecationWarning),
    ("`torch.jit.(script|save|load|trace|freeze|optimize_for_inference)` is deprecated", FutureWarning),
    ("torch.quantize_per_tensor, torch.quantize_per_channel", UserWarning),
    # The exporter of quantized operations is the legacy one, and says so in four ways.
    ("You are using the legacy TorchScript-based ONNX export", DeprecationWarning),
    ("The feature will be removed. Please remove usage of this function", DeprecationWarning),
    ("The input to trace is already a ScriptModule", UserWarning),
    ("no signature found for <torch.ScriptMethod object", UserWarning),
    # torch's own qconfigs ask for reduce_range in the way that its own observers advise against.
    ("Please use quant_min and quant_max to specify the range", UserWarning),
)
"""What torch is known to warn of here: start of the message, and category. pyproject.toml lists the same."""


def prepare_process() -> None:
    """Make the process fit to compute."""
    machine.keep_freed_memory()
    for message, category in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # A model is built of many thousand objects that live for a stage: looking for garbage each time a few hundred are
    # new took a fifth of converting and scripting.
    gc.set_threshold(20_000)


def has_spare_core() -> bool:
    """Whether this process may use more cores than torch computes on."""
    return machine.num_cores() > torch.get_num_threads()


def resolve_engine(name: str) -> str:
    """The engine that `name` stands for on this machine.

    Raises:
        MachineError: If this CPU, or this build of torch, lacks it.
    """
    engine = machine.default_engine() if name == "auto" else name
    supported = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if engine not in supported:
        raise MachineError(
            f"Engine {engine!r} is not available: this machine's torch has {', '.join(supported)}. "
            "Set `engine` in the recipe to one of these, or to auto."
        )
    return engine


@contextmanager
def use_engine(engine: str) -> Iterator[None]:
    """Quantize and run int8 models with `engine` inside the block.

    Raises:
        MachineError: If this machine lacks it.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = resolve_engine(engine)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


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


def ptq_qconfig(activation: Any, per_channel: bool) -> Any:
    """A qconfig of observers.

    Args:
        activation: Makes the observer of each activation.
        per_channel: Whether weights have one scale an output channel, or one a tensor.
    """
    weight = tq.default_per_channel_weight_observer if per_channel else tq.default_weight_observer
    return _qconfig(activation, weight)


def qat_qconfig(activation: Any, weight: Any | None) -> Any:
    """A qconfig of fake quantization.

    Args:
        activation: Makes that of each activation.
        weight: Makes that of each weight; None: torch's own, with one scale a tensor.
    """
    return _qconfig(activation, weight or tq.default_fused_wt_fake_quant)


def _qconfig(activation: Any, weight: Any) -> Any:
    # Plain functions: of its own kind of constructor, torch makes a trial object for every module of the model, which
    # took half the time of preparing one.
    return tq.QConfig(activation=functools.partial(activation), weight=functools.partial(weight))


def prepare_ptq(model: nn.Module, qconfig: Any) -> nn.Module:
    """Put observers into a model fused in mode "eval", in place."""
    model.qconfig = qconfig
    return tq.prepare(model.eval(), inplace=True)


def prepare_qat(model: nn.Module, qconfig: Any) -> nn.Module:
    """Put fake quantization into a model fused in mode "qat", in place."""
    model.qconfig = qconfig
    prepared = tq.prepare_qat(model.train(), inplace=True)
    for module in prepared.modules():
        if isinstance(module, intrinsic_qat.ConvBn2d):
            replaced: Any = module
            replaced._forward_approximate = MethodType(_forward_conv_bn, module)
            quantize = replaced.activation_post_process
            if isinstance(module, intrinsic_qat.ConvBnReLU2d) and hasattr(quantize, "rectifies"):
                quantize.rectifies = True
                replaced.forward = MethodType(_forward_conv_bn_relu, module)
    return prepared


def _forward_conv_bn(conv_bn: Any, x: torch.Tensor) -> torch.Tensor:
    """What torch's fused Conv and BatchNorm compute in training: conv(x, fake_quant(w s)) / s, then BatchNorm.

    torch divides the convolution's output by s, the scale that folding BatchNorm will give to the weights; here the
    weights are divided, which are a thousandth of the size. The passes over the output, there and in the gradient,
    took half the time of a training step.
    """
    norm = conv_bn.bn
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    weight = conv_bn.weight_fake_quant(conv_bn.weight * scale) / scale
    return norm(conv_bn._conv_forward(x, weight, conv_bn.bias))


def _forward_conv_bn_relu(conv_bn_relu: Any, x: torch.Tensor) -> torch.Tensor:
    """As torch's, but for the ReLU where the fake quantization that comes next does what a ReLU does."""
    y = conv_bn_relu._forward(x)
    return y if getattr(conv_bn_relu.activation_post_process, "rectifies", False) else nn.functional.relu(y)


def convert(prepared: nn.Module, *, inplace: bool = False) -> nn.Module:
    """An int8 model made of a prepared one, or of its copy, for the engine in use (see `use_engine`)."""
    return tq.convert(prepared.eval(), inplace=inplace)


def convert_blank(prepared: nn.Module) -> nn.Module:
    """An int8 model whose weights and scales are still to be loaded, made of a prepared model that saw no image."""
    for module in prepared.modules():
        # Every observer must have seen something: torch has no scale for it otherwise.
        if isinstance(module, ObserverBase) and not getattr(module, "ch_axis", -1) >= 0:
            module(torch.zeros(1))
        weight_fake_quant = getattr(module, "weight_fake_quant", None)
        if weight_fake_quant is not None:
            weight_fake_quant(module.weight)
    return convert(prepared, inplace=True)


def set_range(fake_quantize: Any, observer: Any) -> None:
    """Give fake quantization the grid that an observer has found, and its moving average that range to start from."""
    scale, zero_point = observer.calculate_qparams()
    low = (observer.quant_min - zero_point) * scale
    high = (observer.quant_max - zero_point) * scale
    own = fake_quantize.activation_post_process
    own.min_val.resize_(()).copy_(low.squeeze())
    own.max_val.resize_(()).copy_(high.squeeze())
    fake_quantize.scale.resize_(scale.shape).copy_(scale)
    fake_quantize.zero_point.resize_(zero_point.shape).copy_(zero_point)


def set_bias(module: Any, bias: torch.Tensor) -> None:
    """Set the bias [C] of a layer in training; of a fused one, by its BatchNorm: what it is once that is folded."""
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
    """Keep the BatchNorm statistics of fused QAT modules as they are from now on.

    This sets an attribute that no state_dict holds: whoever loads a model must freeze it again.
    """
    model.apply(intrinsic_qat.freeze_bn_stats)


def fake_quantize_qat(prepared: nn.Module, *, weights: bool, activations: bool) -> None:
    """Make a quantization-aware trained model compute in float what int8 would, in place.

    Each fake quantization is replaced by rounding to the grid that `convert` takes, or by nothing. Its own would not
    do: torch's fused kernel has max/127 for a symmetric range, and torch's conversion 2 max/255.
    """
    for module in list(prepared.modules()):
        for name, wanted in (("weight_fake_quant", weights), ("activation_post_process", activations)):
            fake_quantize = getattr(module, name, None)
            if isinstance(fake_quantize, FakeQuantizeBase):
                setattr(module, name, FixedFakeQuantize(fake_quantize) if wanted else nn.Identity())


def fake_quantize_ptq(prepared: nn.Module, *, weights: bool, activations: bool) -> None:
    """Make a calibrated (PTQ) model compute in float what int8 would, in place.

    Weights are rounded to the int8 grid once; each observer is replaced by rounding to the grid it has found,
    or by nothing.
    """
    for module in list(prepared.modules()):
        observer = getattr(module, "activation_post_process", None)
        if isinstance(observer, ObserverBase):
            module.activation_post_process = FixedFakeQuantize(observer) if activations else nn.Identity()
        qconfig = getattr(module, "qconfig", None)
        if weights and qconfig is not None and isinstance(module, nn.Conv2d | nn.Linear):
            weight_observer = qconfig.weight()
            with torch.no_grad():
                weight_observer(module.weight)
                module.weight.copy_(FixedFakeQuantize(weight_observer)(module.weight))


class FixedFakeQuantize(nn.Module):
    """Rounds its input to the int8 grid that an observer has found.

    Affine map, Jacob et al. 2018 (arXiv:1712.05877), eq. 1: r = S(q - Z).
    """

    def __init__(self, observer: Any) -> None:
        super().__init__()
        scale, zero_point = observer.calculate_qparams()
        self.scale: torch.Tensor = scale
        self.zero_point: torch.Tensor = zero_point.to(torch.int32)
        self.quant_min, self.quant_max = int(observer.quant_min), int(observer.quant_max)
        per_channel = observer.qscheme in {torch.per_channel_affine, torch.per_channel_symmetric}
        self.axis: int | None = int(observer.ch_axis) if per_channel else None

    @property
    def grid(self) -> tuple[float, float, float]:
        """Least and largest value, and the step; of an activation, which has one grid."""
        step, zero_point = float(self.scale), int(self.zero_point)
        return (self.quant_min - zero_point) * step, (self.quant_max - zero_point) * step, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded, float32, of the same shape."""
        if self.axis is None:
            low, high, step = self.grid
            dtype = torch.qint8 if self.quant_min < 0 else torch.quint8
            # torch's fake quantization gives the same, and takes six times as long: it finds a mask for a gradient.
            return torch.quantize_per_tensor(x.clamp(low, high), step, int(self.zero_point), dtype).dequantize()
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point, self.axis, self.quant_min, self.quant_max
        )
