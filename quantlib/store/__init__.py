"""Artifacts by content, the records of the stages that made them, and the journal of runs."""
