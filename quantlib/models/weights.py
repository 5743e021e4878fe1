"""A float model's weights: where they are read from, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import MachineError, ModelError, reason_of
from quantlib.recipe.sections import TIMM, TORCHVISION

_PARALLEL = "module."


def read_weights(weights: str, architecture: str) -> dict[str, Tensor]:
    """The state_dict that a recipe's `weights` names, read without running any code.

    Raises:
        ModelError: If the file is missing or is not a state_dict, or torchvision knows no such weights.
        MachineError: If they would have to be downloaded and cannot be.
    """
    if weights.startswith(TORCHVISION):
        return _download(find_torchvision_weights(architecture, weights))
    if weights.startswith(TIMM):
        return _download_from_timm(architecture, weights)
    path = Path(weights)
    if not path.is_file():
        raise ModelError(
            f"No weights file {weights!r}: set model.weights to a state_dict file (.pth or .safetensors), "
            '"torchvision:NAME", "timm:TAG" or "train".'
        )
    state: Any
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # It reads .safetensors as well.
    except Exception as error:
        raise ModelError(
            f"Weights {weights!r} cannot be read as a state_dict: {reason_of(error)}. "
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
                f"Weights {source!r} have the wrong shape: {name} is {list(tensor.shape)}, but the architecture "
                f"has {list(own[name].shape)}. Set num_classes, width_mult, … in model.arguments as in training."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"Weights {source!r} hold NaN or infinity in {name}: use a checkpoint from before training diverged."
            )
    model.load_state_dict(state)


def find_torchvision_weights(architecture: str, weights: str) -> Any:
    """The member of torchvision's `WeightsEnum` that "torchvision:NAME" means for an architecture.

    Raises:
        ModelError: If torchvision has no such architecture, or no such weights for it.
    """
    from torchvision.models import get_model_weights

    name = weights.removeprefix(TORCHVISION)
    try:
        choices = get_model_weights(architecture.removeprefix(TORCHVISION))
    except ValueError:
        raise ModelError(
            f"torchvision has no model {architecture!r}, so no weights for it: give a state_dict file."
        ) from None
    if name not in choices.__members__:
        raise ModelError(
            f"torchvision has no weights {name!r} for {architecture!r}. Allowed: {', '.join(choices.__members__)}."
        )
    return choices[name]


def find_timm_weights(architecture: str, weights: str) -> Any:
    """Timm's `PretrainedCfg` that "timm:TAG" means for an architecture.

    Raises:
        ModelError: If it is not an architecture of timm, or has no such weights.
        MachineError: If timm is not installed.
    """
    name, tag = architecture.removeprefix(TIMM), weights.removeprefix(TIMM)
    if not architecture.startswith(TIMM):
        raise ModelError(f"model.weights = {weights!r} are for a model of timm, and the architecture is {name!r}.")
    try:
        import timm
    except ImportError:
        raise MachineError(
            f"model.weights = {weights!r} need timm, which is not installed: pip install quantflow[timm]"
        ) from None
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{name}.*")]
    if tag not in tags:
        raise ModelError(f"timm has no weights {tag!r} for {name!r}. Allowed: {', '.join(tags) or 'none'}.")
    return timm.models.get_pretrained_cfg(f"{name}.{tag}")


def _download_from_timm(architecture: str, weights: str) -> dict[str, Tensor]:
    find_timm_weights(architecture, weights)
    import timm

    name = f"{architecture.removeprefix(TIMM)}.{weights.removeprefix(TIMM)}"
    try:
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise MachineError(
            f"Weights {weights} are not on this machine and cannot be downloaded ({reason_of(error)}). "
            "Download them elsewhere, and give the file as model.weights."
        ) from None
    return state


def _download(weights: Any) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        raise MachineError(
            f"Weights {TORCHVISION}{weights.name} are not on this machine and cannot be downloaded "
            f"({reason_of(error)}). Download {weights.url} elsewhere and put it into {torch.hub.get_dir()}/checkpoints."
        ) from None
    return state


def _few(word: str, names: Sequence[str]) -> str:
    """Number of names, and the first few in brackets, as in `2 missing (a, b); `; "" if there are none."""
    return f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}); " if names else ""
