"""A model as a graph of modules: which of them are fused."""
