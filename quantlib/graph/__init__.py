"""A model as a graph of modules: which ones are fused."""
