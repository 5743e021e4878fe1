"""Which stage feeds which: the branches of a run, its search, and its plan."""
