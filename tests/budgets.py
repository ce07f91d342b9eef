"""How many examples Hypothesis draws: few in the quick run, many under `--hypothesis-profile long`; always the same."""

from __future__ import annotations

from hypothesis import settings

for _name in ("quick", "long"):
    settings.register_profile(_name, derandomize=True, deadline=None)
settings.load_profile("quick")


def examples(quick: int, long: int) -> int:
    """Gives a test's `max_examples`."""
    return long if settings.get_current_profile_name() == "long" else quick
