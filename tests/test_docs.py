"""The docs are held to the code."""

from __future__ import annotations

import re
from pathlib import Path

from cellserve.service.settings import Settings

ROOT = Path(__file__).parent.parent


def test_every_setting_stands_in_the_table_as_it_is() -> None:
    rows = re.findall(r"^\| `--(\S+)` \| `(\S+)` \| `(.*?)` \| (.*?) \|", (ROOT / "docs/settings.md").read_text(), re.M)
    told = {flag: (variable, default, what) for flag, variable, default, what in rows}
    settings = {
        name.replace("_", "-"): (f"CELLSERVE_{name.upper()}", str(field.default), field.description)
        for name, field in Settings.model_fields.items()
    }
    assert told == settings
