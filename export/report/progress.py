"""Shows which stage an export is in, and how long each took."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Stages:
    """The stages of an export: a list with running times on a terminal, one line a stage elsewhere.

    Called with a description of each stage as it begins. On a terminal the list vanishes when the export ends.

    Args:
        console: Where to show them.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.perf_counter()
        self._list = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._current: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._list.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._list.stop()

    def __call__(self, stage: str) -> None:
        """Ends the stage before and begins this one."""
        if not self._console.is_terminal:
            seconds = time.perf_counter() - self._began
            self._console.print(f"{seconds:5.1f} s  {stage}", markup=False, highlight=False, soft_wrap=True)
            return
        if self._current is not None:
            self._list.update(self._current, completed=1)
        self._current = self._list.add_task(escape(stage), total=1)
