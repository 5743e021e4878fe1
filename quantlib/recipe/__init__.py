"""The recipe: what a run does, checked once."""
