"""Architectures: MobileNetV2 in a form that can be quantized, and the registry that finds a user's own.

A float model is stored as what is needed to rebuild it (architecture, arguments) and its state_dict.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantlib.errors import MachineError, ModelError, RecipeError, suggest
from quantlib.imports import call_function, import_function
from quantlib.models import exported_file, exported_graph
from quantlib.models.checkpoint import Header
from quantlib.models.mobilenet_v2 import mobilenet_v2
from quantlib.models.weights import load_weights, read_weights
from quantlib.recipe.sections import FILE, TIMM, TORCHVISION

if TYPE_CHECKING:
    from quantlib.models.source import ModelInput

# Weights of which fewer names and shapes fit are those of something else.
_NEAR = 0.8
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": mobilenet_v2}
"""The architectures that a recipe can name; quantlib.inputs.ARCHITECTURES lists their names."""


def find_architecture(name: str) -> Callable[..., nn.Module]:
    """The callable that builds an architecture.

    Args:
        name: A registered name, "torchvision:NAME", "timm:NAME", "file:" for an exported model, or
            "package.module:function".

    Raises:
        RecipeError: If there is none.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name == FILE:
        return exported_graph.build
    if name.startswith(TORCHVISION):
        return _find_in_torchvision(name.removeprefix(TORCHVISION))
    if name.startswith(TIMM):
        return _find_in_timm(name.removeprefix(TIMM))
    return import_function(name, "model.architecture", ARCHITECTURES)


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


def _find_in_torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise RecipeError(f"torchvision has no classifier {name!r}{suggest(name, known)}")
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    return builder


def _find_in_timm(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError:
        raise MachineError(
            f"model.architecture = {TIMM + name!r} needs timm, which is not installed: pip install quantflow[timm]"
        ) from None
    known = timm.list_models()
    if name not in known:
        raise RecipeError(f"timm has no model {name!r}{suggest(name, known)}")
    return functools.partial(timm.create_model, name)


def _takes_num_classes(function: Callable[..., nn.Module]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == "num_classes" or each.kind is each.VAR_KEYWORD for each in parameters)


def arguments_of(source: ModelInput, num_classes: int) -> dict[str, Any]:
    """What the architecture is called with: the recipe's arguments, and `num_classes` if it takes that.

    For an exported model it is the graph, so that a stored model needs no other file.

    Raises:
        ModelError: If the file of an exported model cannot be read.
    """
    if source.architecture == FILE:
        return {"program": exported_file.read_program(source.file)}
    arguments: dict[str, Any] = json.loads(source.arguments)
    if _takes_num_classes(find_architecture(source.architecture)):
        arguments = {"num_classes": num_classes} | arguments
    return arguments


def from_input(
    source: ModelInput, num_classes: int, input_shape: tuple[int, int, int], seed: int
) -> tuple[nn.Module, Header]:
    """The model that a recipe names, and its header.

    Args:
        source: Its weights are loaded, unless they are "train"; without any, those in an exported model's file.
        num_classes: Passed to the architecture if it takes that and the recipe does not set it.
        input_shape: Channels, height and width of its input.
        seed: Seeds the initial weights.

    Raises:
        RecipeError, ModelError, MachineError: If there is no such model, or its weights do not fit.
    """
    arguments = arguments_of(source, num_classes)
    torch.manual_seed(seed)
    model = build(source.architecture, arguments)
    if source.weights != "train":
        state = _read_state(source)
        try:
            load_weights(model, state, source.weights or source.file)
        except ModelError as error:
            nearest = nearest_architecture(state)
            hint = f' They look like those of "{nearest}".' if nearest not in {None, source.architecture} else ""
            raise ModelError(f"{error}{hint}") from None
    return model.eval(), Header(
        architecture=source.architecture, arguments=arguments, code=source.code, input_shape=input_shape
    )


def _read_state(source: ModelInput) -> dict[str, Tensor]:
    """The state_dict that fills a model."""
    if source.architecture != FILE:
        return read_weights(source.weights, source.architecture)
    state = exported_file.read_state(source.file)
    if source.weights:
        # A state_dict lacks the constants of the model's code.
        state |= read_weights(source.weights, source.architecture)
    return state


def nearest_architecture(state: Mapping[str, Tensor]) -> str | None:
    """The classifier of torchvision, or registered here, that weights fit best; None if none is near.

    Args:
        state: A state_dict; the size of its last layer does not matter.
    """
    from torchvision import models

    builders = ARCHITECTURES | {
        f"{TORCHVISION}{name}": models.get_model_builder(name) for name in models.list_models(models)
    }
    given = {(name, tuple(tensor.shape[1:])) for name, tensor in state.items()}
    best, most = None, _NEAR
    for name, builder in builders.items():
        # Otherwise these two warn that they would.
        settings = {"init_weights": False} if name.endswith(("googlenet", "inception_v3")) else {}
        own: set[tuple[str, tuple[int, ...]]] = set()
        # RegNet computes its widths with tensors, which need memory then.
        with suppress(NotImplementedError), torch.device("meta"):
            own = {(key, tuple(tensor.shape[1:])) for key, tensor in builder(**settings).state_dict().items()}
        alike = len(given & own) / len(given | own)
        if alike > most:
            best, most = name, alike
    return best


def check_logits(model: nn.Module, num_classes: int, input_shape: tuple[int, int, int]) -> None:
    """Run one empty image through a model; several through one that was exported for a fixed number of them.

    Raises:
        ModelError: If that fails, or does not give [1, num_classes].
    """
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(1, *input_shape))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        channels, height, width = input_shape
        raise ModelError(
            f"The model cannot take an image of {height} x {width} pixels in {channels} channels: {error}. "
            "Set data.crop and data.channels to what it was trained with."
        ) from None
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"The model gives {got} for one image, and the data has {num_classes} classes: it must give "
            f"[1, {num_classes}]. Use the dataset it was trained on, or set num_classes in model.arguments."
        )
    exported_graph.check_batch(model, input_shape)
