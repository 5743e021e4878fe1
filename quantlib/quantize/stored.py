"""The single place that opens stored models, in any state from float to quantized."""

from __future__ import annotations

from collections import deque

from torch import fx

from quantlib.errors import ModelError
from quantlib.graph.fusion import fuse_model
from quantlib.graph.tracing import trace
from quantlib.models import checkpoint, registry
from quantlib.models.checkpoint import Header
from quantlib.quantize.conversion import convert
from quantlib.quantize.preparation import int8_layers, observe, prepare_qat, round_activations

# The model of the last `hand_over`, with its bytes and its header.
_handed_over: deque[tuple[bytes, fx.GraphModule, Header]] = deque(maxlen=1)


def open_model(content: bytes) -> tuple[fx.GraphModule, Header]:
    """Open a model from the bytes that `checkpoint.save` or `hand_over` returned; with its header.

    Raises:
        ModelError: If the architecture has other layers now, or would be quantized in other places.
    """
    try:
        known, model, header = _handed_over.pop()  # Removed in either case: the caller may change it.
    except IndexError:
        known = None
    if known == content:
        return model, header
    header, state = checkpoint.read(content)
    model = build_blank(header)
    # The plan that it was made by: its layers, and every tensor that is rounded, which has a name among the values.
    other = sorted(model.state_dict().keys() ^ state.keys())
    if header.int8_layers:
        other += sorted({*int8_layers(model)} ^ {*header.int8_layers})
    if other:
        raise ModelError(
            f"{header.architecture} is not the model that was stored: its plan differs in {', '.join(other[:3])}. "
            "The library that builds it has changed; run the recipe again."
        )
    model.load_state_dict(state)
    return model, header


def hand_over(model: fx.GraphModule, header: Header) -> bytes:
    """Save as `checkpoint.save` does, when the caller is done with the model: the next `open_model` may return it.

    Usually the next stage asks for it, and building a MobileNetV2 again takes 0.2 s.
    """
    content = checkpoint.save(model, header)
    _handed_over.append((content, model, header))
    return content


def build_blank(header: Header) -> fx.GraphModule:
    """Build a model of the shape that a header describes; its weights and ranges are still to be loaded."""
    model = trace(registry.build(header.architecture, header.arguments).eval(), header.input_shape, whole=header.whole)
    if header.fused is None:
        return model
    scheme = header.scheme
    # Once quantized, a trained model has the shape of a calibrated one.
    model = fuse_model(model, "eval" if header.quantized else header.fused, inplace=True)
    if scheme is None:
        return model if header.observed is None else observe(model, header.observed, inplace=True)
    if header.fused == "qat" and not header.quantized:
        return prepare_qat(model, scheme, inplace=True)
    model = round_activations(model, scheme, inplace=True)
    return convert(model, scheme, inplace=True) if header.quantized else model
