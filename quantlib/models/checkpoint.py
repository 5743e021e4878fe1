"""Models as bytes: a header that says how to build one, and the state_dict that fills it."""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quantlib.models.registry import build

# The model of the last `hand_over`, with its bytes and its header.
_handed_over: deque[tuple[bytes, nn.Module, dict[str, Any]]] = deque(maxlen=1)


def save(model: nn.Module, header: Mapping[str, Any]) -> bytes:
    """A model as bytes: the header says how to build it, the state_dict fills it."""
    buffer = io.BytesIO()
    torch.save({"header": dict(header), "state": model.state_dict()}, buffer)
    return buffer.getvalue()


def hand_over(model: nn.Module, header: Mapping[str, Any]) -> bytes:
    """As `save`, of a model that the caller is done with: whoever loads these bytes next may `take` the model itself.

    Mostly the next stage does, and building the model again takes as long as half of scripting it.
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
