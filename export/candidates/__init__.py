"""Which forms of a model there are, and which one is taken."""
