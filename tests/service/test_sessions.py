"""Sessions against a plain model of what they promise: whatever is done to them, in whatever order, twice or late."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from cellserve.service.engine.engine import Engine
from cellserve.service.errors import Problem
from cellserve.service.idempotency import IdempotencyKey, state_key, step_key
from cellserve.service.sessions.rollout import Rollout, RolloutRunner
from cellserve.service.sessions.stores.protocol import Page, SessionStore
from cellserve.service.sessions.table import SessionTable
from cellserve.service.sessions.writer import SessionWriter
from tests.budgets import examples
from tests.redis_server import RedisServer
from tests.service.helpers import machinery, truth

X = [np.full((steps, 2), value, np.float32) for steps in (1, 2, 40) for value in (0.5, -3.0)]
IDLE, LIMIT = 100.0, 5
WHICH = st.integers(0, 1)  # of the replicas
Replica = tuple[Engine, SessionStore, SessionWriter]


class Expected:
    """What a session should be: its state and position, and the last request with its answer."""

    def __init__(self, state: np.ndarray, position: int) -> None:
        self.state, self.position = state, position
        self.last: tuple[IdempotencyKey, int, Any] | None = None
        self.used = 0.0


class Sessions(RuleBasedStateMachine):
    """All that can be done to sessions, one after the other, against `Expected`."""

    on_device = False  # whether the states stay on a device
    known = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.loop = asyncio.new_event_loop()
        self.replicas = self.begin()
        self.expected: dict[str, Expected] = {}
        self.gone: dict[str, tuple[str, int]] = {}
        self.origins: dict[str, bytes] = {}

    def begin(self) -> list[Replica]:
        on_device = self.on_device
        return [machinery(True, 1e-6, lambda: self.now, LIMIT, on_device, max_batch=4, quantum=8)]

    def teardown(self) -> None:
        for _, store, _ in self.replicas:
            self.loop.run_until_complete(store.close())
        self.loop.close()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Gives the result, or the problem."""
        try:
            return self.loop.run_until_complete(work)
        except Problem as problem:
            return problem

    @rule(target=known, name=st.sampled_from("abcdef"), origin=st.sampled_from([b"1", b"2"]), which=WHICH)
    def create(self, name: str, origin: bytes, which: int) -> Any:
        engine, store, _ = self.replicas[which % len(self.replicas)]
        result = self.do(store.create(engine, None, "owner", name, origin))
        if name in self.expected:
            same = self.origins[name] == origin
            assert (result[1] is False) if same else (result.status == 409)
            if same:
                self.expected[name].used = self.now
            return multiple()
        if name in self.gone:
            assert result.status == 410
            return multiple()
        if isinstance(result, Problem):
            assert (result.status, len(self.expected)) == (503, LIMIT)
            return multiple()
        assert result[1] is True
        self.origins[name] = origin
        self.expected[name] = Expected(np.zeros(2, np.float32), 0)
        self.expected[name].used = self.now
        return name

    @rule(target=known, name=st.sampled_from("abcdef"), which=WHICH)
    def begin_anew(self, name: str, which: int) -> Any:
        engine, store, _ = self.replicas[which % len(self.replicas)]
        result = self.do(store.recreate(engine, "owner", name, b"1"))
        if isinstance(result, Problem):
            assert (result.status, len(self.expected), name in self.expected) == (503, LIMIT, False)
            return multiple()
        self.gone.pop(name, None)
        self.origins[name] = b"1"
        self.expected[name] = Expected(np.zeros(2, np.float32), 0)
        self.expected[name].used = self.now
        return name

    @rule(name=known, x=st.sampled_from(X), offset=st.sampled_from([None, 0, 0, 0, -1, -2, -40, 3]), which=WHICH)
    def step(self, name: str, x: np.ndarray, offset: int | None, which: int) -> None:
        expected = self.expected.get(name)
        position = max(0, (expected.position if expected else 0) + (offset or 0))
        request = None if offset is None else step_key(position, x, True)
        result = self.do(self.stepped(which, name, x, request))
        if expected is None:
            assert result.status == 410
        elif request is None or position == expected.position:
            ys = truth(x, expected.state)
            assert (result.y.tobytes(), result.position, result.replayed) == (
                ys.tobytes(),
                expected.position + len(x),
                False,
            )
            expected.state, expected.position = ys[-1], expected.position + len(x)
            if request is not None:
                expected.last = request, expected.position, ys
            expected.used = self.now
        else:
            self.repeated(expected, request, result)

    async def stepped(self, which: int, name: str, x: np.ndarray, request: IdempotencyKey | None) -> Any:
        _, store, writer = self.replicas[which % len(self.replicas)]
        return await writer.submit(await store.fetch("owner", name), x, True, request)

    @precondition(lambda self: any(one.last for one in self.expected.values()))
    @rule(data=st.data(), which=WHICH)
    def step_again(self, data: st.DataObject, which: int) -> None:
        """The last request of a session with a position comes again."""
        names = sorted(name for name, one in self.expected.items() if one.last)
        name = data.draw(st.sampled_from(names))
        expected = self.expected[name]
        assert expected.last is not None
        request = expected.last[0]
        for x in X:
            if step_key(request.position, x, True) == request:
                self.repeated(expected, request, self.do(self.stepped(which, name, x, request)))

    def repeated(self, expected: Expected, request: IdempotencyKey, result: Any) -> None:
        if expected.last and expected.last[0] == request and expected.last[1] == expected.position:
            assert (result.position, result.replayed) == (expected.position, True)
            assert result.y.tobytes() == expected.last[2].tobytes()
            expected.used = self.now
        else:
            assert (result.status, result.extensions["position"]) == (409, expected.position)

    @rule(
        name=known,
        x=st.sampled_from(X),
        steps=st.integers(1, 5),
        streamed=st.booleans(),
        most=st.sampled_from([1, 2, 9]),
        offset=st.sampled_from([None, 0, 0, 0, -1, 3]),
        which=WHICH,
    )
    def roll_out(
        self, name: str, x: np.ndarray, steps: int, streamed: bool, most: int, offset: int | None, which: int
    ) -> None:
        """A rollout; of a stream at most that many events are read."""
        wanted, expected = Rollout(x, steps, None, streamed), self.expected.get(name)
        position = max(0, (expected.position if expected else 0) + (offset or 0))
        result = self.do(self.rolled(which, name, wanted, None if offset is None else position, most))
        if expected is None:
            assert result.status == 410
        elif offset is None or position == expected.position:
            before, expected.state = expected.state, expected.state.copy()
            if offset is not None or streamed:
                expected.last = self.do(wanted.key(position)), position, (wanted, before)
            expected.position = position
            self.gone_on(expected, wanted, position, before, most, result, False)
        elif expected.last and expected.last[:2] == (self.do(wanted.key(position)), expected.position):
            self.gone_on(expected, wanted, position, expected.last[2][1], most, result, True)
        else:
            assert (result.status, result.extensions["position"]) == (409, expected.position)

    @precondition(lambda self: any(one.last and type(one.last[2]) is tuple for one in self.expected.values()))
    @rule(data=st.data(), most=st.sampled_from([1, 2, 9]), which=WHICH)
    def roll_out_again(self, data: st.DataObject, most: int, which: int) -> None:
        """The last rollout of a session with a position comes again."""
        names = sorted(name for name, one in self.expected.items() if one.last and type(one.last[2]) is tuple)
        name = data.draw(st.sampled_from(names))
        expected = self.expected[name]
        assert expected.last is not None
        request, reached, (wanted, before) = expected.last
        result = self.do(self.rolled(which, name, wanted, request.position, most))
        if reached == expected.position:
            self.gone_on(expected, wanted, request.position, before, most, result, True)
        else:
            assert (result.status, result.extensions["position"]) == (409, expected.position)

    async def rolled(self, which: int, name: str, wanted: Rollout, position: int | None, most: int) -> Any:
        _, store, writer = self.replicas[which % len(self.replicas)]
        rollouts, session = RolloutRunner(writer), await store.fetch("owner", name)
        if not wanted.streamed:
            return await rollouts.run(session, wanted, position)
        given: list[Any] = []
        async with aclosing(rollouts.stream(session, wanted, position, None)) as stream:
            async for one in stream:
                given.append(one)
                if len(given) == most:
                    break
        return given

    def gone_on(
        self, expected: Expected, wanted: Rollout, start: int, before: np.ndarray, most: int, result: Any, again: bool
    ) -> None:
        """What was given is what it should be, and the session as far on as that, or as it was."""
        ys = [truth(wanted.x, before)[-1]]
        while len(ys) < wanted.steps:
            ys.append(truth(ys[-1][None], ys[-1])[0])
        count = min(most, wanted.steps) if wanted.streamed else wanted.steps
        positions = range(start + len(wanted.x), start + len(wanted.x) + count)
        given = result if wanted.streamed else result.generated
        assert [(one.position, one.x.tobytes()) for one in given] == [
            (position, y.tobytes()) for position, y in zip(positions, ys, strict=False)
        ]
        if not wanted.streamed:
            assert (result.position, result.replayed) == (positions[-1], again)
        if positions[-1] > expected.position:
            expected.state, expected.position = ys[count - 1], positions[-1]
        if expected.last and expected.last[0] == self.do(wanted.key(start)):
            expected.last = expected.last[0], expected.position, expected.last[2]
        expected.used = self.now

    @rule(name=known, upload=st.booleans(), offset=st.sampled_from([None, 0, 0, -1, 5]), which=WHICH)
    def set_state(self, name: str, upload: bool, offset: int | None, which: int) -> None:
        expected = self.expected.get(name)
        states = {"s": np.array([7, 8], np.float32)} if upload else None
        position = max(0, (expected.position if expected else 0) + (offset or 0))
        request = None if offset is None else state_key(position, states)

        async def work() -> Any:
            _, store, writer = self.replicas[which % len(self.replicas)]
            return await writer.set_state(await store.fetch("owner", name), states, request)

        result = self.do(work())
        if expected is None:
            assert result.status == 410
        elif request is None or position == expected.position:
            assert result == (expected.position + 1, False)
            expected.state = np.zeros(2, np.float32) if states is None else states["s"]
            expected.position += 1
            if request is not None:
                expected.last = request, expected.position, None
            expected.used = self.now
        elif expected.last and expected.last[0] == request and expected.last[1] == expected.position:
            assert result == (expected.position, True)
            expected.used = self.now
        else:
            assert (result.status, result.extensions["position"]) == (409, expected.position)

    @rule(target=known, name=known, new=st.sampled_from("uvwxyz"), which=WHICH)
    def fork(self, name: str, new: str, which: int) -> Any:
        async def work() -> Any:
            _, store, _ = self.replicas[which % len(self.replicas)]
            return await store.fork(await store.fetch("owner", name), new, name.encode())

        result = self.do(work())
        expected = self.expected.get(name)
        if expected is None:
            assert result.status == 410
            return multiple()
        expected.used = self.now
        if new in self.expected:
            same = self.origins[new] == name.encode()
            assert (result[1] is False) if same else (result.status == 409)
            if same:
                self.expected[new].used = self.now
            return multiple()
        if new in self.gone:
            assert result.status == 410
            return multiple()
        if isinstance(result, Problem):
            assert (result.status, len(self.expected)) == (503, LIMIT)
            return multiple()
        self.origins[new] = name.encode()
        self.expected[new] = Expected(expected.state.copy(), expected.position)
        self.expected[new].used = self.now
        return new

    @rule(name=known, which=WHICH)
    def delete(self, name: str, which: int) -> None:
        result = self.do(self.replicas[which % len(self.replicas)][1].delete("owner", name))
        if name in self.expected:
            assert result is None
            self.gone[name] = "deleted", self.expected.pop(name).position
        else:
            assert result is None if self.gone[name][0] == "deleted" else result.status == 410

    @precondition(lambda self: len(self.replicas) == 1)
    @rule(seconds=st.sampled_from([1.0, 40.0, IDLE]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.replicas[0][1].sweep()
        for name, expected in list(self.expected.items()):
            if expected.used <= self.now - IDLE:
                self.gone[name] = "expired", expected.position
                del self.expected[name]

    @precondition(lambda self: len(self.replicas) > 1)
    @rule(name=known, which=WHICH)
    def forget(self, name: str, which: int) -> None:
        """A replica drops a session from its slots, as it does when others need them."""
        _, store, _ = self.replicas[which % len(self.replicas)]
        session = store.table.live.get(f"owner/{name}")
        if session is not None:
            store.table.remove(session)

    @rule(which=WHICH)
    def list_all(self, which: int) -> None:
        async def pages() -> list[Any]:
            _, store, _ = self.replicas[which % len(self.replicas)]
            found, after = [], (0, 0)
            while True:
                page, following = await store.page("owner", after, 2)
                found += page
                if following is None:
                    return found
                after = following

        listed = {one.id: one.position for one in self.do(pages())}
        assert listed == {name: expected.position for name, expected in self.expected.items()}
        assert self.do(self.replicas[0][1].page("another", (0, 0), 9)) == ([], None)

    async def read(self, store: SessionStore, name: str) -> Any:
        return await store.read_state(await store.fetch("owner", name))

    @invariant()
    def they_agree(self) -> None:
        for engine, store, writer in self.replicas:
            for name, expected in self.expected.items():
                states, position = self.do(self.read(store, name))
                expected.used = self.now
                assert position == expected.position
                assert states["s"].tobytes() == expected.state.tobytes()
            for name, (reason, position) in self.gone.items():
                fate = self.do(self.read(store, name))
                assert (fate.status, fate.extensions) == (410, {"reason": reason, "position": position})
            assert not engine.arena.locked.any()
            assert not writer.in_flight
            assert engine.arena.in_use == len(store.table.live)
            assert engine.queued == 0


class SharedSessions(Sessions):
    """The same on two replicas over one Redis, each asked in turn as chance has it."""

    url = ""

    def begin(self) -> list[Replica]:
        from cellserve.service.sessions.stores.redis_client import RedisClient
        from cellserve.service.sessions.stores.shared import SharedStore

        redis = Redis.from_url(self.url)
        redis.flushall()
        redis.close()
        replicas: list[Replica] = []
        for on_device in (False, True):
            engine, _, _ = machinery(on_device=on_device, max_batch=4, quantum=8)
            table = SessionTable(3600)
            table.register(engine)
            store = SharedStore(RedisClient(self.url, 3600, 3600, 5, 0), table, 3, LIMIT)
            self.loop.run_until_complete(store.start())
            replicas.append((engine, store, SessionWriter(store)))
        return replicas


class EmbeddedSessions(SharedSessions):
    """The same on two replicas over one LMDB folder of three shards."""

    sync = False

    def begin(self) -> list[Replica]:
        from cellserve.service.sessions.stores.lmdb.folder import Folder
        from cellserve.service.sessions.stores.lmdb.store import LmdbStore
        from cellserve.service.sessions.stores.lmdb.store_client import LmdbClient

        self.folder = TemporaryDirectory()
        (Path(self.folder.name) / "store.json").write_text('{"format": 2, "shards": 3}')
        folder = Folder(Path(self.folder.name), 2**24, self.sync, 10, workers=2)
        replicas: list[Replica] = []
        for on_device in (False, True):
            engine, _, _ = machinery(on_device=on_device, max_batch=4, quantum=8)
            table = SessionTable(IDLE, lambda: self.now)
            table.register(engine)
            client = LmdbClient(folder, IDLE, 86400, 2**24, lambda: self.now)
            store = LmdbStore(client, table, 3, LIMIT)
            replicas.append((engine, store, SessionWriter(store)))
        return replicas

    def teardown(self) -> None:
        self.loop.run_until_complete(self.replicas[0][1].close())
        self.loop.close()
        self.folder.cleanup()

    @rule(seconds=st.sampled_from([1.0, 80.0, 1.2 * IDLE]))
    def wait_for_both(self, seconds: float) -> None:
        """Every session was read just now; they expire between the idle time and a tenth more."""
        self.now += seconds
        for _, store, _ in self.replicas:
            self.do(swept(store))
        for name, expected in list(self.expected.items()):
            if seconds > 1.1 * IDLE:
                self.gone[name] = "expired", expected.position
                del self.expected[name]


class SyncedSessions(EmbeddedSessions):
    """The same with a sync per commit."""

    sync = True


async def swept(store: SessionStore) -> None:
    store.sweep()


Sessions.TestCase.settings = settings(max_examples=examples(30, 300), stateful_step_count=40)
SharedSessions.TestCase.settings = settings(max_examples=examples(8, 80), stateful_step_count=30)
TestSessions = Sessions.TestCase


class SessionsOnDevice(Sessions):
    """The same, with states that stay on a device."""

    on_device = True


SessionsOnDevice.TestCase.settings = settings(max_examples=examples(10, 300), stateful_step_count=40)
TestSessionsOnDevice = SessionsOnDevice.TestCase


@pytest.mark.hypothesis
def test_shared_sessions_are_what_they_promise(redis: RedisServer) -> None:
    SharedSessions.url = redis.url
    run_state_machine_as_test(SharedSessions, settings=SharedSessions.TestCase.settings)


class Untouched(dict[Any, Any]):
    """A table that may be looked up in, and not walked through."""

    def walked(self) -> Any:
        raise AssertionError("all sessions were walked through")

    __iter__ = items = values = keys = walked


def test_a_page_in_memory_looks_at_its_owners_sessions_alone() -> None:
    engine, store, _ = machinery()
    for number in range(5):
        for owner in ("alice", "bob"):
            store.create_now(engine, owner=owner, session_id=f"{owner}-{number}")
    asyncio.run(store.delete("bob", "bob-2"))
    table = store.table
    table.live, table.of_owner = Untouched(table.live), Untouched(table.of_owner)
    table.by_slot = Untouched({engine: Untouched(table.by_slot[engine])})
    seen: list[str] = []
    sizes: list[int] = []
    after: Page | None = (0, 0)
    while after is not None:
        page, after = asyncio.run(store.page("bob", after, 3))
        seen += [one.id for one in page]
        sizes.append(len(page))
    assert (seen, sizes) == (["bob-0", "bob-1", "bob-3", "bob-4"], [3, 1])
    assert asyncio.run(store.page("carol", (0, 0), 3)) == ([], None)


@pytest.mark.hypothesis
@pytest.mark.parametrize("machine", [EmbeddedSessions, SyncedSessions])
def test_embedded_sessions_are_what_they_promise(machine: type[EmbeddedSessions]) -> None:
    run_state_machine_as_test(machine, settings=SharedSessions.TestCase.settings)
