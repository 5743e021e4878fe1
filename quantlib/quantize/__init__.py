"""A fused float model becomes an int8 one: observers, calibration, training, conversion."""
