"""Where a float model comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantlib.data.split import NOT_IN_KEY


@dataclass(frozen=True)
class ModelInput:
    """The float model's source."""

    architecture: str
    """The recipe's `architecture`; for an exported model "file:" alone."""
    arguments: str
    """JSON of the architecture's keyword arguments."""
    weights: str = field(metadata=NOT_IN_KEY)
    """The recipe's `weights`; "" if it has none."""
    fingerprint: str
    """Identifies the weights: a file's SHA-256, "torchvision:NAME", or "train"; "" if the recipe has none."""
    code: str
    """Hash of the user's own module, or of an exported model's file; "" for a registered architecture."""
    file: str = field(default="", metadata=NOT_IN_KEY)
    """Path of an exported model."""
