"""What a run of the tests saw, printed as it is seen and kept as Markdown: docs/how-to/gpu.md is written from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


class Report:
    """Sections of lines and tables; the file is written anew with each, since the machine may be gone at any moment.

    Args:
        path: The Markdown file.
        title: Its first line.
    """

    def __init__(self, path: Path, title: str) -> None:
        self._path = path
        self._sections: dict[str, list[str]] = {}
        self._title = title

    def line(self, section: str, text: str) -> None:
        """Adds a line to a section."""
        print(f"\n    {text}", flush=True)
        self._sections[section] = [*self._sections.get(section, []), text, ""]
        self._write()

    def row(self, section: str, cells: Mapping[str, object]) -> None:
        """Adds a row to a section's table; the first row's names are its head."""
        kept = self._sections.get(section, [])
        texts = {name: str(cell).replace("|", "/") for name, cell in cells.items()}
        print(f"\n    {section}: " + ", ".join(f"{name} {text}" for name, text in texts.items()), flush=True)
        if not kept:
            kept = [_row(list(texts)), _row(["---"] * len(texts))]
        self._sections[section] = [*kept, _row(list(texts.values()))]
        self._write()

    def _write(self) -> None:
        parts = [f"## {section}\n\n" + "\n".join(lines).strip() for section, lines in self._sections.items()]
        self._path.write_text("\n\n".join([f"# {self._title}", *parts]) + "\n")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
