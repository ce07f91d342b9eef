"""Continuous batching: work from all requests in ticks over an arena of states."""
