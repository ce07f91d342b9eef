"""Tables of sessions: text from elsewhere does not steer the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cellserve.service.errors import printable
from cellserve.sessions.place import Listed
from cellserve.sessions.tables import table_of


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a~1 \u00fc", "a~1 \u00fc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb", "a\\nb"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eevil", "\\u202eevil"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    console.print(table_of([Listed(text, text, 1, 0), Listed(text, "", 0, 0, unreadable=text)]))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count(shown) == 4
    assert not {"\x1b", "\x9b", "\u202e"} & set(printed)
