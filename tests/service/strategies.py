"""What Hypothesis draws for more than one module of tests."""

from __future__ import annotations

from hypothesis import strategies as st

SEEDS = st.integers(0, 2**63 - 1)  # of a rollout's sampling
