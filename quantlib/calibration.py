"""Calibration: observers in, training images through, activation ranges out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantlib import fusion, images, models, preparation
from quantlib.progress import Progress, silent
from quantlib.scheme import Scheme


def calibrate(
    fused: nn.Module,
    scheme: Scheme,
    shards: Sequence[Path],
    batch_size: int,
    progress: Progress = silent,
) -> nn.Module:
    """A copy of a fused model whose observers have seen the images of `shards`.

    Args:
        fused: Fused in mode "eval".
        scheme: Which observers, and which layers they are put into.
        shards: Files of decoded images, in order.
        batch_size: Images a forward pass.
        progress: Called with (images done, images in all).
    """
    prepared = preparation.prepare(fused, scheme, "eval")
    total, done = images.count(shards), 0
    with torch.inference_mode():
        for x, _ in images.batches(shards, batch_size):
            prepared(x)
            done += len(x)
            progress(done, total)
    return prepared


def load_prepared(content: bytes) -> tuple[nn.Module, dict[str, Any]]:
    """A prepared model (PTQ: calibrated; QAT: an epoch's state) and its header, as `models.save` made it."""
    header, state = models.open_saved(content)
    prepared = preparation.prepare(fusion.rebuild(header), Scheme.from_header(header), header["fused"])
    prepared.load_state_dict(state)
    return prepared, header
