"""Reading bodies: large ones in a process of their own, in turns of their clients; small ones here."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import pytest

from cellserve.models.signature import Signature, StateSpec, TensorSpec
from cellserve.service.errors import BodyTooLarge, InvalidInput, NotJson
from cellserve.service.validation.decoding import LARGE_BYTES, Decoding
from cellserve.service.validation.json_bodies import read_prediction, read_states, read_step
from cellserve.service.validation.json_input import TensorDecoder

T = TypeVar("T")

READER = TensorDecoder(
    Signature(
        inputs=(TensorSpec(name="x", shape=(2,)),),
        outputs=(TensorSpec(name="y", shape=(1,)),),
        states=(StateSpec(name="h", next_name="h_next", shape=(3,)),),
    )
)


@asynccontextmanager
async def reading() -> AsyncIterator[Decoding]:
    decoding = Decoding()
    try:
        yield decoding
    finally:
        decoding.close()


def run(work: Callable[[Decoding], Awaitable[T]]) -> T:
    async def main() -> T:
        async with reading() as decoding:
            return await work(decoding)

    return asyncio.run(main())


def step(steps: int, last: str = "[1, 2]") -> bytes:
    return b'{"x": [' + b"[0.5, 1.5], " * steps + last.encode() + b"]}"


def test_a_large_body_gives_what_a_small_one_gives() -> None:
    body = step(20_000)
    assert len(body) > LARGE_BYTES
    large = run(lambda decoding: decoding.read("", read_step, READER, body=body))
    small = read_step(READER, body)
    np.testing.assert_array_equal(large[0], small[0])
    assert large[1:] == small[1:]


@pytest.mark.parametrize(
    ("body", "kind", "told"),
    [
        (step(20_000, "[1]"), InvalidInput, "x[20000]: 1 number where the model takes 2"),
        (step(20_000, "[1, 1e99]"), InvalidInput, "x[20000][1]: not a finite number"),
        (step(20_000, "[1, NaN]"), InvalidInput, "x[20000][1]: not a finite number"),
        (step(20_000, "[1"), NotJson, "send a JSON document"),
    ],
)
def test_its_errors_are_the_same_and_name_the_place(body: bytes, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told.replace("[", r"\[")):
        run(lambda decoding: decoding.read("", read_step, READER, body=body))
    with pytest.raises(kind, match=told.replace("[", r"\[")):
        read_step(READER, body)


def test_a_process_that_was_killed_is_started_again() -> None:
    async def work(decoding: Decoding) -> None:
        await decoding.read("", read_step, READER, body=step(20_000))
        child = decoding._process._child
        assert child is not None
        os.kill(child.process.pid, signal.SIGKILL)
        x, *_ = await decoding.read("", read_step, READER, body=step(30_000))
        assert len(x) == 30_001
        assert decoding._process._child is not child

    run(work)


def test_a_process_that_has_needed_much_memory_ends_and_the_next_body_is_read() -> None:
    async def work(decoding: Decoding) -> None:
        for _ in range(2):
            x, *_ = await decoding.read("", read_step, READER, body=step(1_000_000))
            assert len(x) == 1_000_001

    run(work)


def test_clients_take_turns() -> None:
    async def work(decoding: Decoding) -> list[str]:
        done: list[str] = []

        async def one(client: str) -> None:
            await decoding.read(client, read_step, READER, body=step(20_000))
            done.append(client)

        many = [asyncio.ensure_future(one("a")) for _ in range(6)]
        await asyncio.sleep(0)
        await asyncio.gather(one("b"), *many)
        return done

    assert "b" in run(work)[:2]


def test_the_event_loop_keeps_running_meanwhile() -> None:
    async def work(decoding: Decoding) -> float:
        await decoding.read("", read_step, READER, body=step(2000))  # starts the process
        longest, before, ended = 0.0, time.process_time(), False

        async def read() -> None:
            nonlocal ended
            with pytest.raises(InvalidInput):
                await decoding.read("", read_step, READER, body=step(1_000_000, "[1, 1e99]"))
            ended = True

        task = asyncio.ensure_future(read())
        while not ended:
            await asyncio.sleep(0.001)
            now = time.process_time()
            longest, before = max(longest, now - before), now
        await task
        return longest

    assert run(work) < 0.5  # seconds of processor time that this process took in one go, whatever else the machine did


def test_sequences_are_counted_before_they_are_looked_at() -> None:
    body = json.dumps({"sequences": [[["wrong"]]] * 5}).replace('"wrong"', "1").encode()
    with pytest.raises(BodyTooLarge, match="a request may have 4, got 5"):
        read_prediction(READER, 4, body)


@pytest.mark.parametrize("depth", [1, 800, 985])
def test_states_of_a_wrong_shape_are_refused_at_their_first_value(depth: int) -> None:
    body = b'{"states": {"h": ' + b"[" * depth + b"0," * 300_000 + b"0" + b"]" * depth + b"}}"
    began = time.perf_counter()
    with pytest.raises(InvalidInput, match=r"states|nested too deeply"):
        read_states(READER, body)
    assert time.perf_counter() - began < 3  # it was 15 seconds: depth times leaves


def test_an_error_is_short_whatever_the_names() -> None:
    names: dict[str, Any] = {f"{'k' * 1000}{number}": 0 for number in range(1000)}
    with pytest.raises(InvalidInput) as raised:
        read_states(READER, json.dumps({"states": names}).encode())
    assert len(raised.value.document()) < 600
    with pytest.raises((InvalidInput, NotJson)) as refused:
        read_states(READER, b'{"states": {"' + b"k" * 5000 + b'": [NaN]}}')
    assert len(refused.value.document()) < 600


@pytest.mark.parametrize("key", ['"\\ud800"', '"\\udfff\\ud800"'])
def test_a_lone_surrogate_beside_a_nan_can_be_reported(key: str) -> None:
    with pytest.raises((InvalidInput, NotJson)) as raised:
        read_step(READER, b'{"x": {' + key.encode() + b": [NaN]}}")
    assert json.loads(raised.value.document())["status"] in (400, 422)
