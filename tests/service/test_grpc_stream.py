"""A gRPC stream: requests whose answers are not read are bounded in number and in bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cellserve.service.api.inference.grpc_stream import RequestStream


@pytest.mark.parametrize(("window", "window_bytes", "read"), [(256, 10_000, 10), (3, 10_000, 4), (256, 1, 1)])
def test_requests_are_read_as_far_as_the_windows_allow(window: int, window_bytes: int, read: int) -> None:
    pulled = 0

    async def requests() -> AsyncIterator[bytes]:
        nonlocal pulled
        for _ in range(40):
            pulled += 1
            yield bytes(1000)

    async def sequence_of(request: bytes) -> tuple[str, str]:
        return "", ""

    async def answer(request: bytes) -> bytes:
        return bytes(1003)

    async def work() -> None:
        stream = RequestStream(answer, sequence_of, window, window_bytes)
        answers = stream.answers(requests())
        await anext(answers)
        for _ in range(100):
            await asyncio.sleep(0)
        assert pulled == read
        assert len([one async for one in answers]) == 39

    asyncio.run(work())
