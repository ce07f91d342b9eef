"""Shows which load is under way: a bar on a terminal, a plain line a phase elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Phases:
    """The phases of a benchmark.

    Args:
        console: Where to show them.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._began, self._total = console, time.monotonic(), 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def expect(self, loads: int) -> None:
        """Adds loads that are going to be measured."""
        self._total += loads
        self._bar.update(self._task, total=self._total)

    def begin(self, phase: str) -> None:
        """Names what is being done."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=escape(phase))
        else:
            seconds = time.monotonic() - self._began
            self._console.print(f"{seconds:5.1f} s  {phase}", markup=False, soft_wrap=True)

    def done(self) -> None:
        """Marks a load as measured."""
        self._bar.advance(self._task)
