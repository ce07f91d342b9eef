"""The exceptions of docs/how-to/client.md are the client's; tests/docs runs its examples."""

from __future__ import annotations

import re

from cellserve import errors
from tests.helpers import ROOT


def test_the_exceptions_that_the_page_names_exist() -> None:
    text = (ROOT / "docs/how-to/client.md").read_text()
    named = re.findall(r"^\| (`\w+`.*?) \|", text, re.M)
    names = [name for cell in named for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 10 and all(issubclass(getattr(errors, name), errors.CellserveError) for name in names)
