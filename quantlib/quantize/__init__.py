"""Turns a fused float model into a quantized one: calibration, ranges, bias correction, training, conversion."""
