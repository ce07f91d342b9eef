"""The process in which large bodies are read, as the server sees it: parsing holds the interpreter's lock for seconds.

It is started by the first large body, and ends with the server, when it has been idle or when it has grown. It has no
part of the server but the code that reads bodies.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from cellserve.service.errors import QueueFull
from cellserve.service.validation.decoder_child import HEAD

T = TypeVar("T")

_PART = 256 * 1024  # bytes that are sent or received at a time
_CHILD = "cellserve.service.validation.decoder_child"

log = logging.getLogger("cellserve")


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class DecoderProcess:
    """Calls functions in the decoding process, one at a time; clients take turns."""

    def __init__(self) -> None:
        self._clients: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._turn = asyncio.Lock()
        self._child: _Child | None = None

    async def call(self, client: str, function: Callable[..., T], arguments: tuple[object, ...], body: bytes) -> T:
        """Returns `function(*arguments, body)`, its large arrays received in parts; raises as `Decoding.read` does."""
        # A client has one body at a time in the line for the next turn.
        mine = self._clients.get(client)
        if mine is None:
            mine = self._clients[client] = asyncio.Lock()
        async with mine, self._turn:
            try:
                succeeded, result = await self._call(pickle.dumps((function, arguments)), body)
            except BaseException:
                self.close()  # it may be in the middle of an answer
                raise
        try:
            if not succeeded:
                raise result
            return result  # type: ignore[no-any-return]
        finally:
            del result  # an exception, by way of its traceback, would refer to itself and to the body

    async def _call(self, request: bytes, body: bytes) -> tuple[bool, Any]:
        for is_last in (False, True):  # it may just have ended by itself
            try:
                if self._child is None:
                    self._child = await self._start()
                return await self._exchange(self._child, request, body)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.close()
                if is_last:
                    log.error("the decoding process failed at a body of %d bytes: %r", len(body), error)
        raise QueueFull("large bodies cannot be read at the moment: try again, or send smaller ones")

    async def _start(self) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.get_running_loop().run_in_executor(None, _spawn, theirs)
        reader, writer = await asyncio.open_connection(sock=ours)
        return _Child(process, reader, writer)

    @staticmethod
    async def _exchange(child: _Child, request: bytes, body: bytes) -> tuple[bool, Any]:
        child.writer.write(HEAD.pack(len(request), len(body)) + request)
        for start in range(0, len(body), _PART):
            child.writer.write(memoryview(body)[start : start + _PART])
            await child.writer.drain()
            await asyncio.sleep(0)  # the former does not give way while the other side keeps up
        length, count = HEAD.unpack(await child.reader.readexactly(HEAD.size))
        sizes = np.frombuffer(await child.reader.readexactly(8 * count), np.int64)
        content = await child.reader.readexactly(length)
        buffers = [await _received(child.reader, int(size)) for size in sizes]
        return pickle.loads(content, buffers=buffers)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the process."""
        child, self._child = self._child, None
        if child is not None:
            child.writer.close()
            child.process.kill()
            threading.Thread(target=child.process.wait, daemon=True).start()  # its memory takes a while to free


def _spawn(connection: socket.socket) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # with -P: the path of this process, and no more
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _CHILD, str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )


async def _received(reader: asyncio.StreamReader, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    buffer, done = np.empty(size, np.uint8), 0
    while done < size:
        part = await reader.read(min(_PART, size - done))
        if not part:
            raise asyncio.IncompleteReadError(b"", size - done)
        buffer[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    return buffer
