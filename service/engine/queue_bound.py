"""The bound on the time steps that wait for a model: in all, and by client."""

from __future__ import annotations

from cellserve.service.errors import BodyTooLarge, QueueFull

_UNCOUNTED = 4096  # time steps; while fewer wait, a client's are not counted


class QueueBound:
    """Counts the time steps that wait for a model, over all rows.

    Steps are counted by client only while many wait: a single step to a server that keeps up costs one comparison.

    Args:
        model: The model's name, for error messages.
        most: Time steps that may wait.
        most_by_client: Time steps of one client that may wait.
    """

    def __init__(self, model: str, most: int, most_by_client: int) -> None:
        self._model, self._most, self._most_by_client = model, most, min(most, most_by_client)
        self._uncounted = min(_UNCOUNTED, self._most_by_client // 4)
        self.waiting = 0
        self.by_client: dict[str, int] = {}  # steps that were counted for a client

    def enter(self, client: str, steps: int) -> bool:
        """Adds steps; returns whether they are counted for the client, as `leave` must be told.

        Raises:
            BodyTooLarge, QueueFull: As `check` does.
        """
        counted = self.waiting + steps > self._uncounted
        if counted:
            self.check(client, steps)
            self.by_client[client] = self.by_client.get(client, 0) + steps
        self.waiting += steps
        return counted

    def check(self, client: str, steps: int) -> None:
        """Checks whether steps could be added.

        Raises:
            BodyTooLarge: One client may never have so many.
            QueueFull: Too many are waiting.
        """
        own = self.by_client.get(client, 0)
        if steps > self._most_by_client:
            raise BodyTooLarge(
                f"the request has {steps} time steps, and {self._most_by_client} of a client may wait for a model: "
                f"split it into several requests",
                limit=self._most_by_client,
            )
        if own + steps > self._most_by_client:
            raise QueueFull(
                f"{own} of your time steps are waiting for model {self._model!r}, and a client may have "
                f"{self._most_by_client}: try again in a second"
            )
        # Who has less than a fair share waiting is not refused for what others have.
        if self.waiting + steps > self._most and own + steps > self._most // (len(self.by_client) + (not own)):
            raise QueueFull(f"{self.waiting} time steps are waiting for model {self._model!r}: try again in a second")

    def leave(self, client: str, steps: int, counted: bool) -> None:
        """Removes steps that have run, or will not run any more."""
        self.waiting -= steps
        if counted:
            left = self.by_client[client] - steps
            if left:
                self.by_client[client] = left
            else:
                del self.by_client[client]
