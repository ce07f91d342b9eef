"""The page's colours can be read: contrasts of WCAG 2.2, in both schemes."""

from __future__ import annotations

import re

import pytest

from tests.helpers import ROOT

ON = [
    ("text", "back"), ("text", "card"), ("dim", "back"), ("dim", "card"), ("accent", "card"), ("accent", "back"),
    ("on-accent", "accent"), ("text", "accent-back"), ("good", "card"), ("bad", "card"), ("bad", "bad-back"),
    ("text", "state-back"),
]  # fmt: skip
DRAWN = [("field", "card"), ("state", "card"), *((f"s{place}", "card") for place in (1, 2, 3, 4))]


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_what_is_behind_them(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", (ROOT / "service/ui/style.css").read_text(), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme]))
    assert [pair for pair in ON if contrast(*(colours[name] for name in pair)) < 4.5] == []
    assert [pair for pair in DRAWN if contrast(*(colours[name] for name in pair)) < 3] == []
