"""The repository entry."""
