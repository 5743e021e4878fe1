"""QAT: images per second, as the tutorial trains and as quantflow does, MobileNetV2 at 224 px in batches of 30.

    python benchmarks/qat_training.py

Each side runs in its own process, because quantflow changes its process's memory allocator.
"""

import json
import subprocess
import sys
import time

import pairs
import torch
from torch import nn
from torchvision.models import quantization

from quantlib import machine
from quantlib.graph import fusion
from quantlib.graph.tracing import trace
from quantlib.models import mobilenet_v2
from quantlib.quantize import preparation
from quantlib.recipe.scheme import Scheme

NUM_STEPS = 5
BATCH_SIZE = 30


def as_in_the_tutorial() -> nn.Module:
    """The model as the tutorial trains it: torch's own modules and layout."""
    model = quantization.mobilenet_v2().train()
    model.fuse_model(is_qat=True)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


def as_quantflow_does() -> nn.Module:
    """The model that the stage `qat_epoch` trains."""
    machine.keep_freed_memory()
    scheme = Scheme(observer="histogram", weights="per_channel", activation_bits=7)
    fused = fusion.fuse_model(trace(mobilenet_v2.mobilenet_v2(), (3, 224, 224)), "qat")
    model = preparation.prepare_qat(fused, scheme)
    return model.train().to(memory_format=torch.channels_last)


SIDES = {"tutorial": as_in_the_tutorial, "quantflow": as_quantflow_does}


def images_a_second(side: str) -> float:
    """Training speed of one side, measured in this process."""
    torch.manual_seed(0)
    model = SIDES[side]()
    x, labels = torch.randn(BATCH_SIZE, 3, 224, 224), torch.randint(0, 1000, (BATCH_SIZE,))
    if side == "quantflow":
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for step in range(1 + NUM_STEPS):
        if step == 1:
            start = time.perf_counter()
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return NUM_STEPS * BATCH_SIZE / (time.perf_counter() - start)


def in_a_process(side: str) -> float:
    """Training speed of one side, measured in its own process."""
    command = [sys.executable, "-W", "ignore", __file__, side]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(images_a_second(sys.argv[1])))
    else:
        samples = pairs.in_turn({side: lambda side=side: in_a_process(side) for side in SIDES}, 5)
        ratios = {"quantflow / tutorial": pairs.ratio(samples, "quantflow", "tutorial")}
        pairs.conclude("qat training", "images_per_second", samples, ratios)
