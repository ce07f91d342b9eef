"""Admission of bodies to be read: for a short time per iteration of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

_SECONDS = 500e-6  # per iteration; the body that is being read when they have passed is the last one


class TimedAdmission:
    """Admits work for a short time per iteration of the event loop, so that many bodies never delay what is small.

    Bodies that are admitted in one iteration join the same tick.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], bool]] = deque()
        self._left = _SECONDS  # in this iteration
        self._scheduled = False  # whether the next iteration starts with what waits

    async def __call__(self) -> None:
        """Waits to be admitted, in order of arrival; nothing else is admitted in the same iteration."""
        admitted = asyncio.get_running_loop().create_future()

        def admit() -> bool:
            if admitted.done():  # cancelled: its client has disconnected
                return False
            admitted.set_result(None)
            self._left = 0.0  # its work begins when its task goes on
            return True

        self.submit(admit)
        await admitted

    def submit(self, work: Callable[[], bool]) -> None:
        """Calls `work` now or in a later iteration, in order of arrival; it says whether there was anything to do."""
        if self._waiting or self._left <= 0:
            self._waiting.append(work)
        else:
            self._admit(work)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._next)

    def _admit(self, work: Callable[[], bool]) -> None:
        start = perf_counter()
        if work():
            self._left -= perf_counter() - start

    def _next(self) -> None:
        self._left = _SECONDS
        while self._waiting and self._left > 0:
            self._admit(self._waiting.popleft())
        self._scheduled = self._left < _SECONDS
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._next)
