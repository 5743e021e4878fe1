"""Architectures: MobileNetV2 in a form that can be quantized, and the registry that finds a user's own.

A float model is stored as what it takes to build it again (architecture, arguments) and its state_dict.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from quantlib.backend import DeQuantStub, FloatFunctional, QuantStub
from quantlib.errors import MachineError, ModelError, QuantflowError, RecipeError

if TYPE_CHECKING:
    from quantlib.inputs import ModelInput

T = TypeVar("T")
Setting = Sequence[int]

_PARALLEL = "module."

# The model of the last `hand_over`, with its bytes and its header.
_handed_over: deque[tuple[bytes, nn.Module, dict[str, Any]]] = deque(maxlen=1)

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
        # An addition of its own, so that its output has an observer; None where shapes do not allow it.
        self.skip_add = FloatFunctional() if stride == 1 and in_channels == out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H / stride, W / stride]."""
        if self.skip_add is not None:
            return self.skip_add.add(x, self.conv(x))
        return self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) that eager-mode quantization can convert.

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
        self.quant = QuantStub()
        self.dequant = DeQuantStub()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last_channels, num_classes))
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] float32, normalized, to logits [N, num_classes]."""
        x = self.features(self.quant(x))  # (N, last_channels, H / 32, W / 32)
        x = x.mean([2, 3])  # (N, last_channels)
        return self.dequant(self.classifier(x))


mobilenet_v2 = MobileNetV2

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": mobilenet_v2}
"""The architectures that a recipe can name; quantlib.inputs.ARCHITECTURES are their names."""


def find_architecture(name: str) -> Callable[..., nn.Module]:
    """The callable that builds an architecture.

    Args:
        name: A registered name, or "package.module:function".

    Raises:
        RecipeError: If there is none.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    return import_function(name, "model.architecture", ARCHITECTURES)


def import_function(name: str, key: str, known: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that "package.module:function" names.

    Raises:
        RecipeError: If `name` is neither that nor known; `key` is the recipe's key that holds it.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise RecipeError(f'{key} = {name!r} is unknown. Allowed: {", ".join(known)}, or "package.module:function".')
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"{key} = {name!r} cannot be imported: {error}. Modules are looked for where Python looks, "
            "and in the folder that quantflow is started in."
        ) from None
    except Exception as error:
        raise RecipeError(f"{key} = {name!r} cannot be imported: its module {_raised(error)}.") from None
    if not callable(function):
        raise RecipeError(f"{key} = {name!r} is a {type(function).__name__}: it must be a function or a class.")
    return function


def call_function(function: Callable[..., T], name: str, *arguments: Any, **named: Any) -> T:
    """What a function gives that a recipe names.

    Raises:
        ModelError: If it raises; with the place in its own file.
    """
    try:
        return function(*arguments, **named)
    except QuantflowError:
        raise
    except Exception as error:
        raise ModelError(f"{name} {_raised(error)}. Mend it there, or change what the recipe gives it.") from None


def _raised(error: Exception) -> str:
    """What was raised and where, as "raised ValueError: no such depth (my/net.py, line 12)"."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}{place}"


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model with its initial weights.

    Raises:
        RecipeError: If there is no such architecture.
        ModelError: If it does not take these arguments, or is not an nn.Module.
    """
    function = find_architecture(architecture)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ModelError(
            f"model.arguments = {dict(arguments)} do not fit {architecture!r}: {error}. "
            f"It is called as {architecture}{inspect.signature(function)}."
        ) from None
    model = call_function(function, architecture, **arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{architecture!r} returned a {type(model).__name__}: it must return a torch.nn.Module.")
    return model


def read_weights(weights: str, architecture: str) -> dict[str, Tensor]:
    """The state_dict that a recipe's `weights` names, read in a way that runs no code.

    Raises:
        ModelError: If the file is missing or is no state_dict, or torchvision knows no such weights.
        MachineError: If they would have to be downloaded and cannot be.
    """
    if weights.startswith("torchvision:"):
        return _torchvision_weights(architecture, weights.removeprefix("torchvision:"))
    path = Path(weights)
    if not path.is_file():
        raise ModelError(
            f'No weights file {weights!r}: set model.weights to a state_dict file, "torchvision:NAME" or "train".'
        )
    state: Any
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"Weights {weights!r} cannot be read as a state_dict: {reason}. "
            "Save it with torch.save(model.state_dict(), FILE); whole pickled models are refused, as they run code."
        ) from None
    # A checkpoint of a training script often holds the state_dict under one of these.
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    # DataParallel and DistributedDataParallel put this before every name.
    if isinstance(state, dict) and state and all(str(name).startswith(_PARALLEL) for name in state):
        state = {str(name).removeprefix(_PARALLEL): value for name, value in state.items()}
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ModelError(
            f"Weights {weights!r} hold a {type(state).__name__}, not a state_dict of tensors. "
            "Save it with torch.save(model.state_dict(), FILE)."
        )
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put a state_dict into a model.

    Args:
        model: Filled in place.
        state: Must have the model's keys and shapes.
        source: Named in the error.

    Raises:
        ModelError: If keys or shapes differ, or a value is not finite.
    """
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ModelError(
            f"Weights {source!r} do not fit the architecture: {_few('missing', missing)}{_few('unknown', unknown)}"
            "use the architecture and arguments that they were trained with."
        )
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise ModelError(
                f"Weights {source!r} have another shape: {name} is {list(tensor.shape)}, and the architecture "
                f"has {list(own[name].shape)}. Set num_classes, width_mult, … in model.arguments as in training."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"Weights {source!r} hold NaN or infinity in {name}: use a checkpoint that was not diverging."
            )
    model.load_state_dict(state)


def save(model: nn.Module, header: Mapping[str, Any]) -> bytes:
    """A model as bytes: the header says how to build it, the state_dict fills it."""
    buffer = io.BytesIO()
    torch.save({"header": dict(header), "state": model.state_dict()}, buffer)
    return buffer.getvalue()


def hand_over(model: nn.Module, header: Mapping[str, Any]) -> bytes:
    """As `save`, of a model that the caller is done with: whoever loads these bytes next may `take` the model itself.

    Mostly the next stage does, and to build the model anew takes as long as half of scripting it.
    """
    content = save(model, header)
    _handed_over.append((content, model, dict(header)))
    return content


def take(content: bytes) -> tuple[nn.Module, dict[str, Any]] | None:
    """The model and the header that `hand_over` made these bytes of, if that was its last call; only once."""
    try:
        made, model, header = _handed_over.pop()  # Gone in either case: whoever gets it may change it.
    except IndexError:
        return None
    return (model, header) if made == content else None


def open_saved(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the state_dict of what `save` made."""
    with warnings.catch_warnings():
        # Quantized tensors are rebuilt through a storage class that torch has deprecated but still writes.
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
        saved = torch.load(io.BytesIO(content), weights_only=True)
    return saved["header"], saved["state"]


def load(content: bytes) -> tuple[nn.Module, dict[str, Any]]:
    """A float model and its header from what `save` made."""
    header, state = open_saved(content)
    model = build(header["architecture"], header["arguments"])
    model.load_state_dict(state)
    return model.eval(), header


def arguments_of(source: ModelInput, num_classes: int) -> dict[str, Any]:
    """What the architecture is called with: the recipe's arguments, and `num_classes` where it takes that."""
    arguments: dict[str, Any] = json.loads(source.arguments)
    if "num_classes" in inspect.signature(find_architecture(source.architecture)).parameters:
        arguments = {"num_classes": num_classes} | arguments
    return arguments


def from_input(source: ModelInput, num_classes: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a recipe names, and its header.

    Args:
        source: Its weights are loaded, unless they are "train".
        num_classes: Passed to the architecture where it takes that and the recipe does not say.
        seed: Of the initial weights.

    Raises:
        RecipeError, ModelError, MachineError: If there is no such model, or its weights do not fit.
    """
    arguments = arguments_of(source, num_classes)
    torch.manual_seed(seed)
    model = build(source.architecture, arguments)
    if source.weights != "train":
        load_weights(model, read_weights(source.weights, source.architecture), source.weights)
    header = {"architecture": source.architecture, "arguments": arguments, "code": source.code}
    return model.eval(), header


def check_logits(model: nn.Module, num_classes: int, crop: int) -> None:
    """Run one empty image through a model.

    Raises:
        ModelError: If that fails, or does not give [1, num_classes].
    """
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(1, 3, crop, crop))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"The model cannot take an image of {crop} x {crop} pixels: {error}. "
            "Set data.crop to the size it was trained with."
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"The model gives {got} for one image, and the data has {num_classes} classes: it must give "
            f"[1, {num_classes}]. Set num_classes in model.arguments, or use the dataset it was trained on."
        )


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


def _torchvision_weights(architecture: str, name: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    try:
        choices = get_model_weights(architecture)
    except ValueError:
        raise ModelError(
            f"torchvision has no model {architecture!r}, so no weights for it: give a state_dict file."
        ) from None
    if name not in choices.__members__:
        raise ModelError(
            f"torchvision has no weights {name!r} for {architecture!r}. Allowed: {', '.join(choices.__members__)}."
        )
    try:
        state: dict[str, Tensor] = choices[name].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        raise MachineError(
            f"Weights torchvision:{name} are not on this machine and cannot be downloaded ({error}). "
            f"Download {choices[name].url} elsewhere and put it into {torch.hub.get_dir()}/checkpoints."
        ) from None
    return state


def _few(word: str, names: Sequence[str]) -> str:
    """As `2 missing (a, b); `, and nothing where there is none."""
    return f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}); " if names else ""
