"""torch's int8 engine: which one this machine has, and which one is in use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantlib.runtimes.available import resolve_engine


@contextmanager
def use_engine(engine: str) -> Iterator[None]:
    """Quantize and run int8 models with `engine` inside the block.

    Raises:
        MachineError: If this machine lacks it.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = resolve_engine(engine)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
