"""The modules of torch's eager-mode quantization that quantlib builds on."""

from typing import Any

import torch
from torch.ao import quantization as tq

QuantStub = tq.QuantStub


DeQuantStub = tq.DeQuantStub


FloatFunctional = torch.ao.nn.quantized.FloatFunctional


FusedModule: Any = torch.ao.nn.intrinsic.ConvReLU2d.__mro__[1]


ObserverBase = tq.ObserverBase


MinMaxObserver = tq.MinMaxObserver


MovingAverageMinMaxObserver = tq.MovingAverageMinMaxObserver


HistogramObserver = tq.HistogramObserver


FakeQuantizeBase = tq.FakeQuantizeBase


# Weight that a MovingAverageMinMaxObserver gives to a new range: its default.
AVERAGING_CONSTANT = 0.01


FusedMovingAvgObsFakeQuantize = tq.FusedMovingAvgObsFakeQuantize


MovingAveragePerChannelMinMaxObserver = tq.MovingAveragePerChannelMinMaxObserver
