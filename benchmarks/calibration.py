"""Calibration: torch's min/max and histogram observers, and one pass that feeds all; MobileNetV2 at 224 px.

python benchmarks/calibration.py
"""

import time

import pairs
import torch
from torch.ao import quantization as tq
from torchvision.models import quantization

from quantlib import machine
from quantlib.graph import fusion
from quantlib.graph.tracing import trace
from quantlib.models import mobilenet_v2
from quantlib.quantize import preparation

NUM_BATCHES = 3
BATCH_SIZE = 30


def main() -> None:
    """Measure, print, write."""
    machine.keep_freed_memory()
    torch.manual_seed(0)
    fused = fusion.fuse_model(trace(mobilenet_v2.mobilenet_v2(), (3, 224, 224)), "eval")

    def torchs(observer: type[tq.ObserverBase]) -> torch.nn.Module:
        model = quantization.mobilenet_v2().eval()
        model.fuse_model(is_qat=False)
        model.qconfig = tq.QConfig(activation=observer, weight=tq.default_per_channel_weight_observer)
        return tq.prepare(model)

    prepared = {
        "float, no observers": fused,
        "torch min/max": torchs(tq.MinMaxObserver),
        "torch histogram": torchs(tq.HistogramObserver),
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
