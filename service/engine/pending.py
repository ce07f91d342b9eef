"""Work in flight that nobody awaits: it passes its outcome to a callback within the tick, and can be cancelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from cellserve.service.engine.work import WorkItem

Array = NDArray[Any]


class Pending:
    """Work in flight; the engine completes it as it completes a future."""

    __slots__ = ("_on_done", "_state", "item")

    item: WorkItem
    _on_done: Callable[..., None]

    def __init__(self) -> None:
        self._state = 0  # 1 if completed, 2 if cancelled

    def done(self) -> bool:
        """Returns whether it is completed or cancelled."""
        return self._state != 0

    def cancelled(self) -> bool:
        """Returns whether it is cancelled."""
        return self._state == 2

    def cancel(self) -> None:
        """Drops what has not been computed; the callback is not called any more."""
        if not self._state:
            self._state = 2
            self._let_go()

    def _let_go(self) -> None:
        """Drops what refers back to this: the garbage collector would find it late, in pauses of 50 ms."""
        del self.item, self._on_done

    def set_result(self, y: Array) -> None:
        """Completes it; called by the engine."""
        raise NotImplementedError

    def set_exception(self, error: BaseException) -> None:
        """Completes it with an error; called by the engine."""
        raise NotImplementedError
