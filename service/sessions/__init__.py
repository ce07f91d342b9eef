"""Who owns which state, and all changes to it."""
