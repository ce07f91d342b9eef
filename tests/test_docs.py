"""The docs are held to the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cellserve.service.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_setting_stands_in_the_table_as_it_is() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text()
    rows = re.findall(r"^\| `--(\S+)` \| `(\S+)` \| `(.*?)` \| (.*?) \|", page, re.M)
    told = {flag: (variable, default, what) for flag, variable, default, what in rows}
    settings = {
        name.replace("_", "-"): (f"CELLSERVE_{name.upper()}", str(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert told == settings


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_prose_of_a_page_is_at_most_119_columns_wide(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    assert not [line for line in prose.splitlines() if len(line) > 119 and not line.startswith("|")]
