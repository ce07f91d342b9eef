"""What the client knows of sessions, and how it locks them."""

from __future__ import annotations

import asyncio
import json
import random
import threading

import numpy as np
import pytest

from cellserve._async.concurrency import AsyncSessionLocks
from cellserve._sync.concurrency import SessionLocks
from cellserve.errors import ConnectionLost, Problem, StepsFailed
from cellserve.protocol.frames import Stepped
from cellserve.protocol.session import SessionRecord
from cellserve.protocol.step_batch import StepBatch
from cellserve.signatures import Signature, SignatureCache
from cellserve.tensors import FrameLayout, TensorSpec

VECTOR = FrameLayout([TensorSpec("x", np.dtype("float32"), (2,))])
SIGNATURE = Signature("lstm", 1, VECTOR, VECTOR, {"h": False}, "last", ())


def test_a_session_is_created_once_and_attached_afterwards() -> None:
    session = SessionRecord("mine", "lstm:1", {"h": [0.5]})
    assert not session.exists
    assert json.loads(session.open_frame()(1)) == {
        "op": "open", "session": "mine", "model": "lstm:1", "states": {"h": [0.5]}, "ref": 1
    }  # fmt: skip
    request = session.open_request()
    assert (request.method, request.path) == ("PUT", "/sessions/mine")
    session.update({"model": "lstm", "version": 1, "position": 3})
    assert (session.exists, session.model, session.position) == (True, "lstm", 3)
    assert json.loads(session.open_frame()(2)) == {"op": "attach", "session": "mine", "ref": 2}
    assert SessionRecord("yours").open_request().method == "GET"


def test_attaching_keeps_an_acknowledged_position() -> None:
    session = SessionRecord("mine", position=3)
    session.attach("socket", {"handle": 7, "model": "lstm", "version": 1, "position": 4})
    assert (session.handle, session.position) == (7, 3)  # the step from 3 is repeated, and its answer too
    fresh = SessionRecord("yours")
    fresh.attach("socket", {"handle": 8, "model": "lstm", "version": 1, "position": 4})
    assert fresh.position == 4


def test_a_batch_moves_the_sessions_that_were_stepped_and_no_others() -> None:
    sessions = [SessionRecord(name, position=1) for name in "abc"]
    batch = StepBatch(sessions, [[1, 2], [3, 4], [5, 6]])
    batch.lay_out(SIGNATURE)
    problem = Problem(410, "gone")
    y = memoryview(np.array([[1, 2], [0, 0]], "<f4").tobytes())
    batch.failures |= batch.receive([0, 2], Stepped([2, 0], y, {1: problem}))
    assert [session.position for session in sessions] == [2, 1, 1]
    with pytest.raises(StepsFailed) as failed:
        batch.raise_failures()
    assert failed.value.failures == {2: problem}
    assert failed.value.y[:, 0].tolist() == [[1, 2], [0, 0], [0, 0]]
    assert batch.outputs("all").tolist() == [[1, 2], [0, 0], [0, 0]]  # no time axis, as x had none


def test_one_error_for_all_rows_is_raised_as_it_is() -> None:
    batch = StepBatch([SessionRecord(), SessionRecord()], [[1, 2], [3, 4]])
    lost = ConnectionLost("lost")
    batch.failures = {0: lost, 1: lost}
    with pytest.raises(ConnectionLost) as raised:
        batch.raise_failures()
    assert raised.value is lost


def test_a_signature_is_forgotten_under_its_name_when_another_version_answers() -> None:
    cache = SignatureCache()
    cache.remember("lstm", SIGNATURE)
    cache.forget_if_outdated("lstm", 1)
    assert cache.get("lstm") is SIGNATURE
    cache.forget_if_outdated("lstm", 2)
    assert cache.get("lstm") is None and cache.get("lstm:1") is SIGNATURE


def groups(sessions: list[SessionRecord]) -> list[list[SessionRecord]]:
    """Groups that overlap, in orders that would block each other if sessions were locked one by one."""
    draw = random.Random(3)
    return [draw.sample(sessions, draw.randint(1, 3)) for _ in range(200)]


def test_threads_that_lock_overlapping_groups_exclude_but_never_block_each_other() -> None:
    sessions, locks = [SessionRecord() for _ in range(4)], SessionLocks()
    inside: list[str] = []
    clashes: list[str] = []

    def use(group: list[SessionRecord]) -> None:
        with locks.hold(group):
            clashes.extend(session.id for session in group if session.id in inside)
            inside.extend(session.id for session in group)
            for session in group:
                inside.remove(session.id)

    threads = [threading.Thread(target=use, args=(group,)) for group in groups(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes and not any(session.locked for session in sessions)


def test_tasks_that_lock_overlapping_groups_exclude_but_never_block_each_other() -> None:
    async def main() -> None:
        sessions, locks = [SessionRecord() for _ in range(4)], AsyncSessionLocks()
        inside: set[str] = set()

        async def use(group: list[SessionRecord]) -> None:
            async with locks.hold(group):
                assert inside.isdisjoint(session.id for session in group)
                inside.update(session.id for session in group)
                await asyncio.sleep(0)
                inside.difference_update(session.id for session in group)

        await asyncio.gather(*map(use, groups(sessions)))
        assert not any(session.locked for session in sessions)

    asyncio.run(main())


def test_a_cancelled_task_releases_its_session() -> None:
    async def main() -> None:
        session, locks = SessionRecord(), AsyncSessionLocks()

        async def hold() -> None:
            async with locks.hold([session]):
                await asyncio.Event().wait()

        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        assert session.locked
        task.cancel()
        async with locks.hold([session]):
            assert task.done()

    asyncio.run(main())
