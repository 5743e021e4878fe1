"""The single place that opens stored models, in any state: float, fused, observed, calibrated, trainable or int8."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from torch import nn

from quantlib.eager.converting import convert_blank
from quantlib.graph.fusion import fuse_model
from quantlib.graph.quantizable import rewrite
from quantlib.models import checkpoint, registry
from quantlib.models.checkpoint import Header
from quantlib.quantize.preparation import observe, prepare
from quantlib.runtimes.engine import use_engine

# The model of the last `hand_over`, with its bytes and its header.
_handed_over: deque[tuple[bytes, nn.Module, Header]] = deque(maxlen=1)


def open_model(content: bytes) -> tuple[nn.Module, Header]:
    """Open a model from the bytes that `checkpoint.save` or `hand_over` returned; with its header.

    Raises:
        MachineError: If it is int8, and this machine lacks its engine.
    """
    try:
        known, model, header = _handed_over.pop()  # Removed in either case: the caller may change it.
    except IndexError:
        known = None
    if known == content:
        return model, header
    header, state = checkpoint.read(content)
    with use_engine(header.engine or "auto"):
        model = build_blank(header)
        model.load_state_dict(state)
    return model, header


def hand_over(model: nn.Module, header: Header) -> bytes:
    """Save as `checkpoint.save` does, when the caller is done with the model: the next `open_model` may return it.

    Usually the next stage asks for it, and building an int8 MobileNetV2 again takes 0.24 s.
    """
    content = checkpoint.save(model, header)
    _handed_over.append((content, model, header))
    return content


def build_blank(header: Header) -> nn.Module:
    """Build a model of the shape that a header describes; its weights and ranges are still to be loaded."""
    model = rewrite(registry.build(header.architecture, header.arguments).eval(), header.input_shape)
    if header.fused is None:
        return model
    model = fuse_model(model, header.fused, inplace=True)
    if header.scheme is None:
        return model if header.observed is None else observe(model, header.observed, inplace=True)
    if header.engine is None:
        return prepare(model, header.scheme, header.fused, inplace=True)
    # Ranges come with the int8 model; an observer that searches for them would waste seconds.
    return convert_blank(prepare(model, replace(header.scheme, observer="minmax"), header.fused, inplace=True))
