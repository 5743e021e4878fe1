"""Where a float model comes from, and how a model is stored."""
