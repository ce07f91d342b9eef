"""Sessions against a plain model of what they promise: whatever is done to them, in whatever order, twice or late."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from service.errors import Problem
from service.exactly_once import Request, state_request, step_request
from service.sessions import Session
from tests.service.conftest import machinery, truth

X = [np.full((steps, 2), value, np.float32) for steps in (1, 2, 40) for value in (0.5, -3.0)]
IDLE = 100.0


class Expected:
    """What a session should be: its state and position, and the last request with its answer."""

    def __init__(self, state: np.ndarray, position: int) -> None:
        self.state, self.position = state, position
        self.last: tuple[Request, int, Any] | None = None
        self.used = 0.0


class Sessions(RuleBasedStateMachine):
    """All that can be done to sessions, one after the other, against `Expected`."""

    known = Bundle("known")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.loop = asyncio.new_event_loop()
        self.engine, self.table, self.changes = machinery(
            clock=lambda: self.now, max_sessions=5, max_batch=4, quantum=8
        )
        self.expected: dict[str, Expected] = {}
        self.gone: dict[str, tuple[str, int]] = {}
        self.objects: dict[str, Session] = {}

    def teardown(self) -> None:
        self.loop.close()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Gives the result, or the problem."""
        try:
            return self.loop.run_until_complete(work)
        except Problem as problem:
            return problem

    @rule(target=known, name=st.sampled_from("abcdef"), origin=st.sampled_from([b"1", b"2"]))
    def create(self, name: str, origin: bytes) -> Any:
        async def work() -> Any:
            return self.table.create(self.engine, None, "owner", name, origin)

        result = self.do(work())
        if name in self.expected:
            same = self.objects[name].origin == origin
            assert (result[1] is False) if same else (result.status == 409)
            if same:
                self.expected[name].used = self.now
            return multiple()
        if name in self.gone:
            assert result.status == 410
            return multiple()
        if isinstance(result, Problem):
            assert result.status == 503
            assert len(self.expected) == 5
            return multiple()
        assert result[1] is True
        self.objects[name] = result[0]
        self.expected[name] = Expected(np.zeros(2, np.float32), 0)
        self.expected[name].used = self.now
        return name

    @rule(name=known, x=st.sampled_from(X), offset=st.sampled_from([None, 0, 0, 0, -1, -2, -40, 3]))
    def step(self, name: str, x: np.ndarray, offset: int | None) -> None:
        expected = self.expected.get(name)
        position = max(0, (expected.position if expected else 0) + (offset or 0))
        request = None if offset is None else step_request(position, x, True)
        result = self.do(self.changes.step(self.objects[name], x, True, request))
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

    @precondition(lambda self: any(one.last for one in self.expected.values()))
    @rule(data=st.data())
    def step_again(self, data: st.DataObject) -> None:
        """The last request of a session with a position comes again."""
        names = sorted(name for name, one in self.expected.items() if one.last)
        name = data.draw(st.sampled_from(names))
        expected = self.expected[name]
        assert expected.last is not None
        request = expected.last[0]
        for x in X:
            if step_request(request.position, x, True) == request:
                self.repeated(expected, request, self.do(self.changes.step(self.objects[name], x, True, request)))

    def repeated(self, expected: Expected, request: Request, result: Any) -> None:
        if expected.last and expected.last[0] == request and expected.last[1] == expected.position:
            assert (result.position, result.replayed) == (expected.position, True)
            assert result.y.tobytes() == expected.last[2].tobytes()
            expected.used = self.now
        else:
            assert (result.status, result.extensions["position"]) == (409, expected.position)

    @rule(name=known, upload=st.booleans(), offset=st.sampled_from([None, 0, 0, -1, 5]))
    def set_state(self, name: str, upload: bool, offset: int | None) -> None:
        expected = self.expected.get(name)
        states = {"s": np.array([7, 8], np.float32)} if upload else None
        position = max(0, (expected.position if expected else 0) + (offset or 0))
        request = None if offset is None else state_request(position, states)
        result = self.do(self.changes.set_state(self.objects[name], states, request))
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

    @rule(target=known, name=known, new=st.sampled_from("uvwxyz"))
    def fork(self, name: str, new: str) -> Any:
        result = self.do(self.table.fork(self.objects[name], new, name.encode()))
        expected = self.expected.get(name)
        if new in self.expected:
            same = self.objects[new].origin == name.encode()
            assert (result[1] is False) if same else (result.status == 409)
            if same:
                self.expected[new].used = self.now
            return multiple()
        if expected is None or new in self.gone:
            assert result.status == 410
            if expected is not None:
                expected.used = self.now
            return multiple()
        expected.used = self.now
        if isinstance(result, Problem):
            assert (result.status, len(self.expected)) == (503, 5)
            return multiple()
        self.objects[new] = result[0]
        self.expected[new] = Expected(expected.state.copy(), expected.position)
        self.expected[new].used = self.now
        return new

    @rule(name=known)
    def delete(self, name: str) -> None:
        result = self.do(self.table.delete("owner", name))
        if name in self.expected:
            assert result is None
            self.gone[name] = "deleted", self.expected.pop(name).position
        else:
            assert result is None if self.gone[name][0] == "deleted" else result.status == 410

    @rule(seconds=st.sampled_from([1.0, 40.0, IDLE]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.table.sweep()
        for name, expected in list(self.expected.items()):
            if expected.used <= self.now - IDLE:
                self.gone[name] = "expired", expected.position
                del self.expected[name]

    @invariant()
    def they_agree(self) -> None:
        assert {session.id for session in self.table.live.values()} == self.expected.keys()
        for name, expected in self.expected.items():
            session = self.table.get("owner", name)
            assert session.position == expected.position
            assert self.engine.arena.read(session.slot)["s"].tobytes() == expected.state.tobytes()
            assert not session.claimed
        for name, (reason, position) in self.gone.items():
            tombstone = self.table.gone[f"owner/{name}"]
            assert (tombstone.reason, tombstone.position) == (reason, position)
        assert not self.engine.arena.held.any()
        assert self.engine.arena.taken == len(self.expected)
        assert self.engine.queued == 0


Sessions.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSessions = Sessions.TestCase
