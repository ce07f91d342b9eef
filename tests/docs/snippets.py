"""The fenced snippets of a page, in their order, each with the output that the page shows for it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
_OUTPUTS = ("json", "text", "")
_SAVED = re.compile(r"(?:#|//) (\S+\.(?:py|mjs))\n")
_IDS = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Output(NamedTuple):
    """What a page shows as printed."""

    language: str
    text: str


@dataclass(frozen=True)
class Snippet:
    """A fenced snippet.

    Attributes:
        language: What stands behind the fence: `sh`, `python`, `js`, ...
        text: What stands within.
        line: Its first line in the page.
        output: The `json`, `text` or bare fence right after it: what it prints.
    """

    language: str
    text: str
    line: int
    output: Output | None = None

    @property
    def file(self) -> str | None:
        """The file that the page says to save it as, in a comment on its first line."""
        found = _SAVED.match(self.text)
        return found[1] if found else None


def snippets(page: Path) -> list[Snippet]:
    """Returns a page's snippets; a fence that shows the output of the one before is part of that one."""
    text = page.read_text()
    found: list[Snippet] = []
    end = 0
    for fence in _FENCE.finditer(text):
        language, content = fence.groups()
        before = found[-1] if found else None
        adjacent = not text[end : fence.start()].strip()
        if (
            before
            and adjacent
            and before.output is None
            and before.language in ("sh", "python")
            and language in _OUTPUTS
        ):
            found[-1] = Snippet(before.language, before.text, before.line, Output(language, content))
        else:
            found.append(Snippet(language, content, text.count("\n", 0, fence.start()) + 2))
        end = fence.end()
    return found


def same(shown: Output, printed: str) -> bool:
    """Whether a page shows what was printed: `...` stands for anything, ids and white space may differ.

    Numbers of JSON agree to a twentieth: processors differ, and so do the weights trained on them. Those of a text are
    times and sizes, and may be anything; the text may be the end of what was printed.
    """
    space = "" if shown.language == "json" else " "  # what tells a number from a name's digits in a text
    expected, got = (_IDS.sub("ID", re.sub(r"\s+", space, text.strip())) for text in (shown.text, printed))
    pattern = r"\s*.*?\s*".join(_any_numbers(part.strip()) for part in expected.split("..."))
    if not re.fullmatch(pattern if shown.language == "json" else f".*{pattern}", got, re.S):
        return False
    if shown.language != "json" or "..." in expected:
        return True
    pairs = zip(_NUMBER.findall(expected), _NUMBER.findall(got), strict=True)
    return all(math.isclose(float(one), float(other), rel_tol=0.05, abs_tol=1e-3) for one, other in pairs)


def _any_numbers(text: str) -> str:
    """A pattern for a text with any numbers in place of its own."""
    return _NUMBER.pattern.join(re.escape(part) for part in _NUMBER.split(text))
