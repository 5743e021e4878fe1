"""The operations `quantized_decomposed`, by which exported graphs round: torch registers them when asked to."""

from typing import Any

from quantlib.errors import ModelError

NAMESPACE = "quantized_decomposed"


def operations() -> Any:
    """The namespace of the operations.

    Raises:
        ModelError: If this torch has none.
    """
    try:
        import torch
        import torch.ao.quantization.fx._decomposed
    except ImportError as error:
        raise ModelError(f"This torch has no {NAMESPACE} operations: {error}.") from None
    return getattr(torch.ops, NAMESPACE)
