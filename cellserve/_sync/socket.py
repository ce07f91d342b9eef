"""A WebSocket that answers frames, read by a thread; `cellserve._async.socket` has the same for asyncio."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from cellserve.errors import CellserveError, ConnectionLost, UnexpectedAnswer
from cellserve.protocol.frames import Answer, Frame, PendingReplies
from cellserve.protocol.socket import OPTIONS, no_answer, not_opened, raise_if_ended, stream_url, was_lost
from cellserve.retry import Timeout


class Socket:
    """One connection, and the thread that reads it."""

    def __init__(self, connection: ClientConnection, timeout: Timeout, max_answer_bytes: int) -> None:
        self._pending: PendingReplies[Future[Answer]] = PendingReplies(Future)
        self._connection = connection
        self._timeout = timeout
        self._max_answer_bytes = max_answer_bytes
        threading.Thread(target=self._read, name="cellserve stream", daemon=True).start()

    @classmethod
    def open(cls, url: str, headers: dict[str, str], timeout: Timeout, max_answer_bytes: int) -> Socket:
        """Connects to a server; raises ConnectionLost, or the Problem that the server answered with."""
        try:
            # websockets 17 requires the connection to be entered; older versions allow it. No `with` block here,
            # since it stays open until `close`.
            connection = connect(
                stream_url(url),
                additional_headers=headers,
                open_timeout=timeout.connect,
                max_size=max_answer_bytes,
                **OPTIONS,
            ).__enter__()
        except (OSError, EOFError, WebSocketException) as error:
            raise not_opened(error, url) from error
        return cls(connection, timeout, max_answer_bytes)

    @property
    def has_ended(self) -> bool:
        """Whether no more frames can be sent."""
        return self._pending.ended is not None

    def ask(self, frames: Sequence[Frame]) -> list[Answer]:
        """Sends frames and returns their answers; raises ConnectionLost, UnexpectedAnswer."""
        waiting = []
        for frame in frames:
            ref, future = self._pending.expect()
            waiting.append(future)
            try:
                self._connection.send(frame(ref))
            except (OSError, WebSocketException) as error:
                raise was_lost(error, self._max_answer_bytes) from error
        deadline = time.monotonic() + self._timeout.answer
        try:
            answers = [future.result(max(0, deadline - time.monotonic())) for future in waiting]
        except TimeoutError:
            self.close(no_answer(self._timeout))
            answers = [future.result() for future in waiting]
        return raise_if_ended(answers)

    def close(self, why: CellserveError) -> None:
        """Closes the connection; whoever waits for an answer gets the error."""
        self._pending.end(why)
        self._connection.close()

    def _read(self) -> None:
        why: CellserveError = ConnectionLost("the server closed the socket")
        try:
            for message in self._connection:
                self._pending.receive(message)
        except WebSocketException as error:
            why = was_lost(error, self._max_answer_bytes)
        except UnexpectedAnswer as error:
            why = error
        self.close(why)
