"""Admission of bodies to be read: one per iteration of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class OnePerLoopIteration:
    """Admits one piece of work per iteration of the event loop, so that many large bodies never delay what is small."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], bool]] = deque()
        self._admitted = False  # in this iteration

    async def __call__(self) -> None:
        """Waits to be admitted, in order of arrival."""
        admitted = asyncio.get_running_loop().create_future()

        def admit() -> bool:
            if admitted.done():  # cancelled: its client has disconnected
                return False
            admitted.set_result(None)
            return True

        self.submit(admit)
        await admitted

    def submit(self, work: Callable[[], bool]) -> None:
        """Calls `work` now or in a later iteration, in order of arrival; it says whether there was anything to do."""
        if self._admitted:
            self._waiting.append(work)
            return
        self._admitted = True
        loop = asyncio.get_running_loop()
        loop.call_soon(self._next, loop)
        work()

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            if self._waiting.popleft()():
                loop.call_soon(self._next, loop)
                return
        self._admitted = False
