"""Where a float model comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantlib.data.split import NOT_IN_KEY


@dataclass(frozen=True)
class ModelInput:
    """The float model's source."""

    architecture: str
    arguments: str
    """JSON of the architecture's keyword arguments."""
    weights: str = field(metadata=NOT_IN_KEY)
    """The recipe's `weights`."""
    fingerprint: str
    """Identifies the weights: a file's SHA-256, "torchvision:NAME", or "train"."""
    code: str
    """Hash of the user's own module, "" for a registered architecture."""
