"""What the store holds: references to artifacts, and the records of the stages that made them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ref:
    """Names an artifact by its content."""

    kind: str
    """What the bytes are: model, images, evaluation, torchscript, …"""
    sha256: str
    """SHA-256 of the bytes, in hex."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Record:
    """What one stage made, kept under the stage's key."""

    key: str
    stage: str
    ingredients: dict[str, str]
    """Everything the key was made of, so that a changed key can be explained."""
    outputs: tuple[Ref, ...]
    seconds: float
    """Wall-clock time that the stage took when it was computed."""
    created_at: str
    """ISO 8601, UTC."""
