"""Bounds of gRPC's connections and calls: gRPC counts the connections, the calls of each client are counted here."""

from __future__ import annotations

import inspect
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from cellserve.service.api.client_identity import grpc_peer
from cellserve.service.api.inference.grpc_messages import Message
from cellserve.service.errors import BodyTooLarge, InvalidInput, Problem, TooManyConnections
from cellserve.service.settings import Settings

LARGEST_SMALL = 64 * 1024  # bytes of a message that is neither an inference request nor part of a stream of them

_NICENESS = 5  # a third of the weight of the event loop's thread


def connection_options(settings: Settings, most: int) -> tuple[tuple[str, int], ...]:
    """Returns the options of a gRPC server that bound its connections, of which it has at most so many."""
    return (
        ("grpc.max_allowed_incoming_connections", most),
        ("grpc.max_concurrent_streams", settings.max_connections_per_client),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.idle_seconds)),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.head_seconds)),
    )


@contextmanager
def behind_event_loop() -> Iterator[None]:
    """Lets the threads that gRPC's C core starts meanwhile, and theirs, run behind the event loop's (on Linux).

    Frames without end keep four of them busy. With equal shares of one core, the event loop waited for 60 to 110 ms in
    a step, for it has to run several times; like this for half of that. Less would be too little on a busy machine.
    """
    before = _threads()
    yield
    for thread in _threads() - before - {one.native_id or 0 for one in threading.enumerate()}:
        with suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)


def _threads() -> set[int]:
    return {int(thread.name) for thread in Path("/proc/self/task").glob("*")}


class CallLimit(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls of an address that has as many under way as it may have connections.

    Args:
        most: The calls of one address, streams and health watches included.
        refuse: Ends a call with a problem.
    """

    def __init__(self, most: int, refuse: Callable[[Message, Problem], Awaitable[None]]) -> None:
        self._most, self._refuse = most, refuse
        self._calls: Counter[str] = Counter()  # by address
        self._limited: dict[str, grpc.RpcMethodHandler] = {}  # by method

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Returns the handler of a call, within the limit."""
        handler = await continuation(details)
        if handler is None:  # an unknown method
            return None
        limited = self._limited.get(details.method)
        if limited is None:
            limited = self._limited[details.method] = self._within_limit(handler)
        return limited

    def _within_limit(self, handler: Any) -> grpc.RpcMethodHandler:
        kind = f"{_kind(handler.request_streaming)}_{_kind(handler.response_streaming)}"
        method = getattr(handler, kind)

        read = handler.request_deserializer  # of health and reflection; the protocol's own methods read their requests

        async def small(request: bytes, context: Message) -> Any:
            """Reads a message, which grpc would do in the event loop however large it is."""
            if read is None:
                return request
            if len(request) > LARGEST_SMALL:
                told = f"the message has {len(request)} bytes: send at most {LARGEST_SMALL}"
                await self._refuse(context, BodyTooLarge(told, limit=LARGEST_SMALL))
            return read(request)

        async def each_small(requests: AsyncIterator[bytes], context: Message) -> AsyncIterator[Any]:
            async for request in requests:
                yield await small(request, context)

        async def given(requests: AsyncIterator[bytes], context: Message) -> Any:
            """Returns what the method takes: a stream of requests, or one."""
            if handler.request_streaming:
                return requests if read is None else each_small(requests, context)
            async for request in requests:
                return await small(request, context)
            await self._refuse(context, InvalidInput("the call has no message", place=""))

        async def call(requests: AsyncIterator[bytes], context: Message) -> Any:
            with self._counted(context) as is_allowed:
                if not is_allowed:
                    await self._refused(context)
                return await method(await given(requests, context), context)

        async def stream(requests: AsyncIterator[bytes], context: Message) -> AsyncIterator[Any]:
            with self._counted(context) as is_allowed:
                if not is_allowed:
                    await self._refused(context)
                async for answer in method(await given(requests, context), context):
                    yield answer

        limited = stream if inspect.isasyncgenfunction(method) else call  # a health watch is a coroutine
        # As if all took streams: a call counts from its start, whether its message ever comes or not.
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        made: grpc.RpcMethodHandler = make(limited, None, handler.response_serializer)
        return made

    @contextmanager
    def _counted(self, context: Message) -> Iterator[bool]:
        address = grpc_peer(context.peer())
        self._calls[address] += 1
        try:
            yield self._calls[address] <= self._most
        finally:
            self._calls[address] -= 1
            if not self._calls[address]:
                del self._calls[address]

    async def _refused(self, context: Message) -> None:
        await self._refuse(
            context,
            TooManyConnections(f"your address has {self._most} calls under way, as many as it may: end some, or wait"),
        )


def _kind(is_stream: bool) -> str:
    return "stream" if is_stream else "unary"


def _milliseconds(seconds: float) -> int:
    return min(max(int(seconds * 1000), 1), 2**31 - 1)
