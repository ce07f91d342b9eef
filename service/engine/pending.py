"""Work under way that nobody awaits: it passes its outcome to a callback within the tick, and may be cancelled."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from cellserve.service.engine.scheduler import Advance

Array = NDArray[Any]


class Pending:
    """Work under way; the engine completes it as it would a future."""

    __slots__ = ("_state", "advance")

    advance: Advance

    def __init__(self) -> None:
        self._state = 0  # 1 when done, 2 when cancelled

    def done(self) -> bool:
        """Whether it has ended."""
        return self._state != 0

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._state == 2

    def cancel(self) -> None:
        """Drops what has not been computed; the callback is not called then."""
        self._state = self._state or 2

    def set_result(self, y: Array) -> None:
        """Completes it; called by the engine."""
        raise NotImplementedError

    def set_exception(self, error: BaseException) -> None:
        """Completes it with an error; called by the engine."""
        raise NotImplementedError
