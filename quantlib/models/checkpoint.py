"""Models as bytes: a header that says what a model is, and the state_dict that fills it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from quantlib.recipe.scheme import FuseMode, Scheme

State = Literal["float", "fused", "observed", "calibrated", "trainable", "quantized"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a stored model is: how its float model is built, and what has been done to it since."""

    architecture: str
    """A registered name, or "package.module:function"."""
    arguments: Mapping[str, Any]
    """What the architecture is called with."""
    code: str
    """Hash of the user's own module, "" for a registered architecture."""
    input_shape: tuple[int, int, int]
    """Channels, height and width of its input."""
    whole: bool = False
    """Whether its forward() cannot be traced: each of its layers is then quantized by itself."""
    fused: FuseMode | None = None
    """The mode in which it is fused; None: it is not."""
    int8_layers: tuple[str, ...] = ()
    """The layers that its plan makes int8; empty if it has none yet, or that need not be compared."""
    observed: tuple[str, ...] | None = None
    """Layers kept in float while it collects statistics of its activations; None: it does not, or no longer."""
    scheme: Scheme | None = None
    """How it is quantized; None: it is float."""
    quantized: bool = False
    """Whether its grids are fixed; every file is written from such a model."""

    @property
    def state(self) -> State:
        """How far it is on the way from a float model to a quantized one."""
        if self.quantized:
            return "quantized"
        if self.scheme is not None:
            return "trainable" if self.fused == "qat" else "calibrated"
        if self.observed is not None:
            return "observed"
        return "float" if self.fused is None else "fused"

    @property
    def kind(self) -> str:
        """Kind of the artifact that such a model is stored as."""
        return f"{self.state}-model"


def save(model: nn.Module, header: Header) -> bytes:
    """A model as bytes; the same model gives the same bytes."""
    buffer = io.BytesIO()
    torch.save({"header": asdict(header), "state": model.state_dict()}, buffer)
    return buffer.getvalue()


def read(content: bytes) -> tuple[Header, dict[str, Any]]:
    """The header and state_dict that `save` wrote; `quantize.stored.open_model` makes a model of them."""
    saved = torch.load(io.BytesIO(content), weights_only=True)
    fields = saved["header"]
    if fields["scheme"] is not None:
        fields["scheme"] = Scheme(**fields["scheme"])
    return Header(**fields), saved["state"]
