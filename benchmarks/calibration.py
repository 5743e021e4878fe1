"""Calibration: torch's min/max and histogram observers, and one pass that feeds all; MobileNetV2 at 224 px.

python benchmarks/calibration.py
"""

import time

import pairs
import torch

from quantlib import machine
from quantlib.graph import fusion
from quantlib.models import mobilenet_v2
from quantlib.quantize import preparation
from quantlib.recipe.scheme import ObserverName, Scheme

NUM_BATCHES = 3
BATCH_SIZE = 30


def main() -> None:
    """Measure, print, write."""
    machine.keep_freed_memory()
    torch.manual_seed(0)
    fused = fusion.fuse_model(mobilenet_v2.mobilenet_v2().eval(), "eval")

    def torchs(observer: ObserverName) -> torch.nn.Module:
        return preparation.prepare(fused, Scheme(observer=observer, weights="per_channel", activation_bits=8), "eval")

    prepared = {
        "float, no observers": fused,
        "torch min/max": torchs("minmax"),
        "torch histogram": torchs("histogram"),
        "one pass for all": preparation.observe(fused, ()),
    }
    batches = [
        torch.randn(BATCH_SIZE, 3, 224, 224).contiguous(memory_format=torch.channels_last) for _ in range(NUM_BATCHES)
    ]

    @torch.inference_mode()
    def milliseconds(model: torch.nn.Module) -> float:
        start = time.perf_counter()
        for batch in batches:
            model(batch)
        return (time.perf_counter() - start) * 1000 / (NUM_BATCHES * BATCH_SIZE)

    for model in prepared.values():
        milliseconds(model)
    samples = pairs.in_turn({name: lambda model=model: milliseconds(model) for name, model in prepared.items()}, 5)
    ratios = {
        "one pass for all / torch min/max": pairs.ratio(samples, "one pass for all", "torch min/max"),
        "torch histogram / one pass for all": pairs.ratio(samples, "torch histogram", "one pass for all"),
    }
    pairs.conclude("calibration", "ms_per_image", samples, ratios)


if __name__ == "__main__":
    main()
