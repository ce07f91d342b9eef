"""One change at a time in each session: whoever comes meanwhile waits. A position can only be sent when it is known."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol


class HasTurn(Protocol):
    """What is one caller's at a time."""

    busy: bool


class Turns:
    """Turns among threads. All of a group are taken at once or none, so that groups cannot wait for each other."""

    def __init__(self) -> None:
        self._free = threading.Condition()

    @contextmanager
    def __call__(self, group: Sequence[HasTurn]) -> Iterator[None]:
        """Waits until all of a group are the caller's."""
        with self._free:
            while any(one.busy for one in group):
                self._free.wait()
            for one in group:
                one.busy = True
        try:
            yield
        finally:
            with self._free:
                for one in group:
                    one.busy = False
                self._free.notify_all()


class AsyncTurns:
    """Turns among the tasks of an event loop."""

    def __init__(self) -> None:
        self._free = asyncio.Event()

    @asynccontextmanager
    async def __call__(self, group: Sequence[HasTurn]) -> AsyncIterator[None]:
        """Waits until all of a group are the caller's."""
        while any(one.busy for one in group):
            await self._free.wait()
        for one in group:
            one.busy = True
        try:
            yield
        finally:
            for one in group:
                one.busy = False
            self._free.set()
            self._free = asyncio.Event()
