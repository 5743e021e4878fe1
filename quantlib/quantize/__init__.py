"""Turns a fused float model into an int8 one: observers, calibration, training, conversion."""
