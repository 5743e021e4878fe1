"""Preparation: puts observers or fake quantization into a fused model, as a scheme says."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.eager.modules import (
    DeQuantStub,
    FusedModule,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    QuantStub,
)
from quantlib.eager.preparing import prepare_ptq, prepare_qat, ptq_qconfig, qat_qconfig
from quantlib.errors import ModelError, suggest
from quantlib.quantize import observers
from quantlib.quantize.fake_quantization import ActivationFakeQuantize, WeightFakeQuantize
from quantlib.recipe.scheme import FuseMode, ObserverName, Scheme

OBSERVERS: dict[ObserverName, type[ObserverBase]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
    "percentile": observers.PercentileObserver,
    "mse": observers.MSEObserver,
}


def prepare(fused: nn.Module, scheme: Scheme, mode: FuseMode, *, inplace: bool = False) -> nn.Module:
    """Put observers (mode "eval") or fake quantization (mode "qat") into a fused model, or into a copy.

    Args:
        fused: Fused in the same mode.
        scheme: In mode "qat", ranges are moving averages whatever its observer, because the model changes as well.
        mode: The mode it was fused in.
        inplace: Change the model itself, not a copy.

    Raises:
        ModelError: If the model has none of the scheme's `float_layers`.
    """
    model = fused if inplace else copy.deepcopy(fused)
    _keep_in_float(model, scheme.float_layers)
    per_channel, reduce_range = scheme.weights == "per_channel", scheme.activation_bits == 7
    if mode == "qat":
        return prepare_qat(model, _qat_qconfig(reduce_range, per_channel))
    activation = OBSERVERS[scheme.observer].with_args(reduce_range=reduce_range)
    return prepare_ptq(model, ptq_qconfig(activation, per_channel))


def observe(fused: nn.Module, float_layers: Iterable[str], *, inplace: bool = False) -> nn.Module:
    """Put observers that serve every scheme with these `float_layers` into a model fused in mode "eval", or a copy.

    Raises:
        ModelError: If the model has none of the `float_layers`.
    """
    model = fused if inplace else copy.deepcopy(fused)
    _keep_in_float(model, float_layers)
    for module in model.modules():
        if isinstance(module, FusedModule) and isinstance(module[-1], nn.ReLU):
            # Nothing else reads its input, and writing the output there took a tenth off calibration time.
            module[-1].inplace = True
    return prepare_ptq(model, ptq_qconfig(observers.ActivationStatistics, True))


def _keep_in_float(model: nn.Module, float_layers: Iterable[str]) -> None:
    for path in find_layers(model, float_layers):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, KeptInFloat(model.get_submodule(path)))


def _qat_qconfig(reduce_range: bool, per_channel: bool) -> Any:
    activation: Any = ActivationFakeQuantize
    weight: Any = WeightFakeQuantize
    return qat_qconfig(
        activation.with_args(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, reduce_range=reduce_range
        ),
        weight.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )
        if per_channel
        else None,
    )


class KeptInFloat(nn.Module):
    """A module that computes in float, between int8 neighbours."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.dequant = DeQuantStub()
        self.module = module
        self.quant = QuantStub()
        # Preparation passes a qconfig down to every module except those that already have one.
        module_: Any = module
        module_.qconfig = None

    def forward(self, x: Tensor) -> Tensor:
        """Run the module in float, int8 in and int8 out."""
        return self.quant(self.module(self.dequant(x)))


def find_layers(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """Paths of the modules named by dotted path or class; of nested ones, only the outermost.

    A fused module also counts as each part it was fused from.

    Raises:
        ModelError: If the model has no module for one of the names.
    """
    found: dict[str, None] = {}
    for name in wanted:
        paths = [path for path, module in model.named_modules() if path and name in (path, *_classes(module))]
        if not paths:
            known = [
                path for path, module in model.named_modules() if path and isinstance(module, nn.Conv2d | nn.Linear)
            ]
            raise ModelError(
                f"float_layers names {name!r}, but the model has no module with that path or class"
                f"{suggest(name, known)} Its layers are {', '.join(known[:3])}, …"
            )
        found.update(dict.fromkeys(paths))
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def _classes(module: nn.Module) -> set[str]:
    parts = list(module.children()) if isinstance(module, FusedModule) else []
    return {type(part).__name__ for part in [module, *parts]} | {
        base.__name__ for base in type(module).__mro__ if base in {nn.Conv2d, nn.Linear}
    }
