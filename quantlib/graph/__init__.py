"""A model as a graph: tracing, the plan of what is int8, fusion."""
