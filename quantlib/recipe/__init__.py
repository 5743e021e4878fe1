"""The recipe: what a run is, checked once."""
