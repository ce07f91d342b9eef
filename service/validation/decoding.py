"""Reads bodies without holding up the event loop: small ones here, a few per iteration, large ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cellserve.service.validation.admission import TimedAdmission
from cellserve.service.validation.decoder_process import DecoderProcess

T = TypeVar("T")

ADMITTED_BYTES = 2 * 1024  # bodies that are larger wait to be admitted
LARGEST_SIMPLE = 64 * 1024  # of one time step of plain numbers, which takes 2 ms at most
LARGE_BYTES = 16 * 1024  # bodies that are larger are read in another process; any smaller one takes 3 ms at most


class Decoding:
    """Calls the functions that read bodies, in this process or in the decoding process."""

    def __init__(self) -> None:
        self.admission = TimedAdmission()
        self._process = DecoderProcess()

    async def read(
        self, client: str, function: Callable[..., T], *arguments: object, body: bytes, size: int | None = None
    ) -> T:
        """Returns `function(*arguments, body)`.

        Args:
            client: Who sent the body; clients take turns in the decoding process.
            function: Reads the body; a function of a module, which the decoding process imports.
            arguments: What it needs besides, pickled for the decoding process.
            body: The body.
            size: How many bytes of the body take time to read; by default all of them.

        Raises:
            Problem: Whatever the function raises.
            QueueFull: The decoding process cannot be started, or has been killed.
        """
        size = len(body) if size is None else size
        if size > LARGE_BYTES:
            return await self._process.call(client, function, arguments, body)
        if len(body) > ADMITTED_BYTES:
            await self.admission()
        return function(*arguments, body)

    def close(self) -> None:
        """Ends the decoding process."""
        self._process.close()
