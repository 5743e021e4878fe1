"""A variant of a run: the float model, or one way to quantize it."""

from dataclasses import dataclass

from quantlib.recipe.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a variant is, before any of it is computed."""

    name: str
    method: str
    """float, ptq or qat."""
    qconfig: str | None = None
    """None for float, like the next two."""
    engine: str | None = None
    scheme: Scheme | None = None
    equalized: bool = False
    smoothing: float | None = None
    bias_corrected: bool = False
