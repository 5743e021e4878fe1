"""A float model as it is, as the graph that everything else works on."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from quantlib.errors import ModelError, reason_of
from quantlib.graph.fusion import fuse_model
from quantlib.graph.plan import Plan, draw_plan
from quantlib.graph.tracing import trace

# Largest change of the logits, as a share of the largest of them, that rounding explains.
_MAX_CHANGE = 1e-4


def trace_model(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """A float model as a graph, with the same parameters and answers.

    Args:
        model: In eval mode; its modules become those of the result.
        input_shape: Channels, height and width of its input.

    Raises:
        ModelError: If it has nothing to quantize, or its answers are not always the same.
    """
    x = torch.rand(3, *input_shape, generator=torch.Generator().manual_seed(0)) * 4 - 2
    model.eval()
    expected = {num_images: _logits(model, x[:num_images]) for num_images in (1, len(x))}
    # Of the modules only, as tracing replaces some: a large model's parameters would take their memory twice.
    original = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    traced = trace(model, input_shape)
    # A layer can be a function of its weight until the model is traced.
    if not any(isinstance(module, nn.Conv2d | nn.Linear) for module in traced.modules()):
        raise ModelError("The model has no Conv2d and no Linear: there is nothing to quantize.")
    if _same(traced, x, expected):
        return traced
    # Its forward() depends on something other than tensors, or on the number of images.
    traced = trace(original, input_shape, whole=True)
    if not _same(traced, x, expected):
        raise ModelError(
            f"{type(model).__name__} answers differently when it is asked again about the same images: remove what is "
            "random in eval mode."
        )
    return traced


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            logits: Tensor = model(x.clone())  # It may overwrite its input.
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot take a batch of {len(x)} images: {reason_of(error)} "
            "It must take any number of them."
        ) from None
    return logits


def plan_of(model: nn.Module, input_shape: tuple[int, int, int]) -> Plan:
    """What of a model becomes int8."""
    return draw_plan(fuse_model(trace(copy.deepcopy(model), input_shape), "eval", inplace=True))


def _same(traced: nn.Module, x: Tensor, expected: Mapping[int, Tensor]) -> bool:
    try:
        with torch.inference_mode():
            return all(
                float((traced(x[:n].clone()) - logits).abs().max()) <= _MAX_CHANGE * max(1.0, float(logits.abs().max()))
                for n, logits in expected.items()
            )
    except (RuntimeError, TypeError):
        return False
