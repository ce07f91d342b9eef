"""The Python client and models of every kind of signature: predict, steps and streams give the same bits and types."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cellserve import AsyncClient, Client, Retry
from cellserve.errors import CannotBeStepped, InvalidInput, SessionExists, StepsFailed, UnknownModel
from cellserve.export.publish import repository_writer
from cellserve.models.signature import MODEL_NAME
from cellserve.service.runtime.batch_invariance import random_inputs
from tests import foreign
from tests.faulty_proxy import FaultyProxy
from tests.kinds import FRAMES, KINDS, LETTERS
from tests.server import Server, start_server
from tests.versions import remove_version

STEPS, ROWS = 7, 3


@pytest.fixture(scope="module")
def server(kinds: Path) -> Iterator[Server]:
    server = start_server("--models", str(kinds))
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def drawn(kind: str, rows: int = ROWS, seed: int = 5) -> Any:
    """Inputs `[rows, STEPS, ...]` as a client gives them: an array, or a dict of several."""
    x, _ = random_inputs(KINDS[kind][1], rows, STEPS, np.random.default_rng(seed))
    return x if x.dtype.names is None else {name: x[name].copy() for name in x.dtype.names}


def at(tensors: Any, *where: Any) -> Any:
    return {name: one[where] for name, one in tensors.items()} if isinstance(tensors, dict) else tensors[where]


def joined(parts: list[Any], axis: int = 0) -> Any:
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts], axis) for name in parts[0]}
    return np.concatenate(parts, axis)


def same(ours: Any, theirs: Any) -> None:
    """Whether the tensors are the same: names, types, shapes and bits."""
    assert isinstance(ours, dict) == isinstance(theirs, dict)
    pairs = [(ours[n], theirs[n]) for n in ours.keys() | theirs.keys()] if isinstance(ours, dict) else [(ours, theirs)]
    for one, other in pairs:
        assert isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def chunks(x: Any) -> list[Any]:
    """One sequence in chunks: a time step without its axis, three, one with its axis, two."""
    return [at(x, 0), at(x, slice(1, 4)), at(x, slice(4, 5)), at(x, slice(5, None))]


def together(answers: list[Any]) -> Any:
    return joined([at(answers[0], None), *answers[1:]])


@pytest.mark.parametrize("kind", KINDS)
def test_predict_steps_and_streams_give_the_same_outputs(client: Client, kind: str) -> None:
    x, told = drawn(kind), KINDS[kind][1]
    sequences = [at(x, row) for row in range(ROWS)]
    whole = client.predict(kind, sequences, outputs="all", return_states=True)
    one = client.predict(kind, sequences[1], outputs="all", return_states=True)
    last = client.predict(kind, sequences, outputs="last")
    wanted = {spec.name: spec.dtype for spec in told.outputs}
    for row, y in enumerate(whole.y):
        assert {name: t.dtype for name, t in (y if len(wanted) > 1 else {told.outputs[0].name: y}).items()} == wanted
        same(last.y[row], at(y, -1, ...))
    same(one.y, whole.y[1])
    assert whole.states is not None and one.states is not None
    same(one.states, whole.states[1])
    with client.session(kind) as session, client.session(kind, one.states) as begun:
        answers = [session.step(chunk, outputs="all") for chunk in chunks(sequences[1])]
        same(together(answers), whole.y[1])
        same(dict(session.state()), one.states)
        rest = session.step(sequences[0], outputs="all")
        same(begun.step(sequences[0], outputs="all"), rest)
        session.set_state(one.states)
        same(session.step(sequences[0], outputs="all"), rest)
        same(client.predict(kind, sequences[0], "all", one.states).y, rest)
        same(client.predict(kind, sequences[:2], "all", [one.states, None]).y[1], whole.y[1])
    with client.stream() as stream:
        sessions = [stream.open(kind) for _ in range(ROWS)]
        answers = [
            at(stream.step(sessions, at(x, slice(None), 0)), slice(None), None),
            stream.step(sessions, at(x, slice(None), slice(1, 4))),
        ]
        assert {name: t.dtype for name, t in (answers[1] if len(wanted) > 1 else {"y": answers[1]}).items()} == (
            wanted if len(wanted) > 1 else {"y": told.outputs[0].dtype}
        )
        y = joined(answers, 1)
        for row in range(ROWS):
            same(at(y, row), at(whole.y[row], slice(4)))
        same(sessions[0].step(at(x, 0, 4)), at(whole.y[0], 4, ...))
        same(sessions[0].step(at(x, 0, slice(5, None)), outputs="last"), at(whole.y[0], -1, ...))
        same(
            stream.step(sessions[1:], at(x, slice(1, None), slice(4, None)), outputs="last"),
            joined([at(whole.y[row], -1, None, ...) for row in (1, 2)]),
        )
        begun = stream.open(kind, one.states)
        same(begun.step(sequences[0]), rest)


def test_the_asyncio_client_gives_the_same_outputs(server: Server, client: Client) -> None:
    async def one(mine: AsyncClient, kind: str) -> None:
        x = drawn(kind)
        sequences = [at(x, row) for row in range(ROWS)]
        whole = client.predict(kind, sequences, outputs="all", return_states=True)
        theirs = await mine.predict(kind, sequences, outputs="all", return_states=True)
        assert whole.states is not None and theirs.states is not None
        async with mine.session(kind) as session, mine.stream() as stream:
            sessions = [stream.open(kind) for _ in sequences]
            y = await stream.step(sessions, x)
            for row in range(ROWS):
                same(theirs.y[row], whole.y[row])
                same(theirs.states[row], whole.states[row])
                same(at(y, row), whole.y[row])
            same(together([await session.step(chunk, outputs="all") for chunk in chunks(sequences[1])]), whole.y[1])
            await session.set_state(theirs.states[0])
            same(dict(await session.state()), whole.states[0])
            streamed = stream.open(kind)
            same(together([await streamed.step(chunk) for chunk in chunks(sequences[1])]), whole.y[1])
            async with mine.session(kind, keep=False) as other:
                listed = [{**told, "created_at": None} async for told in mine.sessions()]
                new = {"session": other.id, "model": kind, "version": 1, "position": 0, "created_at": None}
                assert new in listed

    async def main() -> None:
        async with AsyncClient(server.url) as mine:
            for kind in KINDS:
                await one(mine, kind)
            assert (await mine.labels("letters")).size == 0

    asyncio.run(main())


def test_integers_are_accepted_where_the_model_takes_floats(client: Client) -> None:
    x = np.arange(12).reshape(4, 3)
    wanted = client.predict("frames", x.astype(np.float32), "all", {"s": np.ones(4, np.float32)}).y
    same(client.predict("frames", x, "all", {"s": [1, 1, 1, 1]}).y, wanted)
    same(client.predict("frames", [x.tolist(), x[:1]], "all", [{"s": [1, 1, 1, 1]}, None]).y[0], wanted)
    with client.session("frames") as session, client.stream() as stream:
        session.set_state({"s": [1, 1, 1, 1]})
        same(session.step(x.tolist(), outputs="all"), wanted)
        same(stream.open("frames", {"s": [1, 1, 1, 1]}).step(x), wanted)
    mixed: Any = {"symbol": [1, 2], "level": [[1, 2], [3, 4]]}
    exact: Any = {"symbol": np.array([1, 2], np.uint8), "level": np.array([[1, 2], [3, 4]], np.float64)}
    same(client.predict("symbols", mixed, "all").y, client.predict("symbols", exact, "all").y)


def test_5_6_7_are_three_time_steps_of_a_symbol(client: Client) -> None:
    with client.session("letters") as session, client.stream() as stream:
        assert session.step(5).shape == (7,)
        assert session.step([5, 6, 1], outputs="all").shape == (3, 7)
        streamed = [stream.open("letters") for _ in range(3)]
        assert stream.step(streamed, [5, 6, 1]).shape == (3, 7)
        assert streamed[0].step([5, 6, 1]).shape == (3, 7)
        assert streamed[0].step(5).shape == (7,)
        assert (session.position, streamed[0].position) == (4, 5)
    with client.session("counting", {"n": 41}) as counting:
        assert counting.step(0.5) == np.float32(41.5)
        counting.set_state({"n": 7})
        state = counting.state()
        assert (state["n"].tolist(), state["n"].dtype, state["n"].shape) == (7, np.dtype(np.int64), ())
        counting.set_state(state)
        assert counting.step([1.0, 1.0], outputs="all").tolist() == [8, 9]


BAD: list[tuple[str, Any, str]] = [
    ("letters", 2.5, "integer"),
    ("letters", [1.0, 2.0], "integer"),
    ("letters", 7, "out of bounds"),
    ("letters", 2**40, "out of bounds"),
    ("letters", {"ids": 1}, "array|integer"),
    ("symbols", [1, 2], "symbol|object"),
    ("symbols", {"symbol": 1}, "symbol"),
    ("symbols", {"symbol": [1, 2], "level": [[1.0, 2.0]]}, "differ in time steps"),
    ("symbols", {"symbol": 1.5, "level": [1.0, 2.0]}, "integer"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_step_is_refused_and_moves_no_session(client: Client, number: int) -> None:
    kind, x, told = BAD[number]
    with client.session(kind) as session, client.stream() as stream:
        with pytest.raises(InvalidInput, match=told):
            session.step(x)
        streamed = stream.open(kind)
        with pytest.raises((InvalidInput, ValueError), match=told):
            streamed.step(x)
        assert session.refresh() == streamed.position == 0


def test_a_bad_prediction_is_refused(client: Client) -> None:
    for x, told in ((np.array([1.5]), "float32: send int32"), (np.array([1, 9]), "9 is out of bounds")):
        with pytest.raises(InvalidInput, match=told) as refused:
            client.predict("letters", x)
        assert refused.value.extensions["place"].startswith("x")
    with pytest.raises(InvalidInput, match="send x"):
        client.predict("letters", {"ids": [1]})
    with pytest.raises(UnknownModel):
        client.predict("none", [np.array([1])])
    bad: list[Any] = [[{"symbol": [1, 2], "level": [[1.0, 2.0]]}], [{"symbol": [1]}, {"level": [[1.0, 2.0]]}], [{}]]
    for wrong in bad:
        with pytest.raises(ValueError, match="sequences"):
            client.predict("symbols", wrong)


def test_a_model_that_cannot_be_stepped_predicts_and_says_why_not(client: Client) -> None:
    x = np.random.default_rng(9).normal(size=(5, 3)).astype(np.float32)
    assert client.predict("both-ways", x, outputs="all").y.shape == (5, 8)
    with pytest.raises(CannotBeStepped, match="bidirectional"):
        client.session("both-ways").step(x)
    with client.stream() as stream, pytest.raises(CannotBeStepped, match="bidirectional"):
        stream.open("both-ways").step(x)
    with pytest.raises(InvalidInput, match="return_states"):
        client.predict("both-ways", x, return_states=True)


def test_failures_in_a_frame_of_several_outputs_come_with_the_others_outputs(client: Client) -> None:
    x = drawn("symbols")
    with client.stream() as stream:
        sessions = [stream.open("symbols") for _ in range(ROWS)]
        stream.step(sessions, at(x, slice(None), 0))
        sessions[1].delete()
        with pytest.raises(StepsFailed, match="1 of 3") as failed:
            stream.step(sessions, at(x, slice(None), 1))
    for row in (0, 2):
        wanted = at(client.predict("symbols", at(x, row), outputs="all").y, slice(1, 2))
        same(at(failed.value.y, row), wanted)
    assert list(failed.value.failures) == [1] and not failed.value.y["features"][1].any()


def test_a_lost_frame_of_integers_is_repeated_and_applied_once(server: Server, client: Client) -> None:
    x = drawn("symbols")
    proxy = FaultyProxy(server.url)
    with Client(proxy.url, retry=Retry(first=0.02)) as mine, mine.stream() as stream:
        sessions = [stream.open("symbols") for _ in range(ROWS)]
        session = mine.session("symbols")
        ys, stepped = [], []
        for time in range(STEPS):
            proxy.faults.extend(["lose"] if time % 2 else [])
            ys.append(at(stream.step(sessions, at(x, slice(None), time)), slice(None), None))
            proxy.faults.extend(["cut"] if time % 2 else [])
            stepped.append(at(session.step(at(x, 0, time)), None))
        session.delete()
    proxy.close()
    whole = client.predict("symbols", [at(x, row) for row in range(ROWS)], outputs="all").y
    for row in range(ROWS):
        same(at(joined(ys, 1), row), whole[row])
    same(joined(stepped), whole[0])
    assert proxy.done["lose"] == proxy.done["cut"] == 3


def test_a_signature_is_read_once_and_only_when_needed(server: Server) -> None:
    x = drawn("frames")
    proxy = FaultyProxy(server.url)
    with Client(proxy.url) as client:
        client.predict("frames", x[0])
        with client.session("frames") as session:
            session.step(x[0])
        assert proxy.done["none"] == 4  # a prediction; a creation, a step, a deletion
        for _ in range(2):
            client.predict("letters", drawn("letters")[0])
            client.predict("frames", x[0], return_states=True)
            client.labels("letters")
        assert proxy.done["none"] == 4 + 2 * 2 + 2
    proxy.close()


def test_all_sessions_are_listed_page_by_page(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cellserve.protocol.http._PAGE", 2)
    made = [client.session("letters") for _ in range(5)]
    for session in made:
        session.step([1, 2])
    listed = {one["session"]: one for one in client.sessions()}
    for session in made:
        created_at = datetime.fromisoformat(listed[session.id].pop("created_at"))
        assert timedelta() < datetime.now(UTC) - created_at < timedelta(minutes=10)
        assert listed[session.id] == {"session": session.id, "model": "letters", "version": 1, "position": 2}
        client.attach(session.id).delete()
    assert not list(client.sessions())


def test_a_session_stays_on_its_version_and_a_new_one_may_take_other_tensors(tmp_path: Path) -> None:
    models = tmp_path / "models"
    repository_writer.write(models, "letters", None, {MODEL_NAME: foreign.described(foreign.letters(), LETTERS)})
    server = start_server("--models", str(models))
    try:
        ids, x = np.array([1, 2, 3]), np.arange(6).reshape(2, 3)
        with Client(server.url) as client, client.stream() as stream:
            first = client.predict("letters", ids, outputs="all", return_states=True)
            assert first.states is not None
            old, streamed = client.session("letters", session_id="old"), stream.open("letters")
            same(old.step(ids[:1], outputs="all"), first.y[:1])
            same(streamed.step(ids[:1]), first.y[:1])
            repository_writer.write(models, "letters", None, {MODEL_NAME: foreign.described(foreign.frames(), FRAMES)})
            httpx.post(f"{server.url}/models/reload").raise_for_status()
            same(old.step(ids[1:], outputs="all"), first.y[1:])
            same(streamed.step(ids[1:]), first.y[1:])
            same(client.attach("old").state()["s"], first.states["s"])
            assert (old.version, old.fork().version, streamed.version) == (1, 1, 1)
            # The client has cached the signature of version 1 under this name.
            second = client.predict("letters", x, outputs="all")
            assert (second.version, second.y.shape) == (2, (2, 2))
            assert client.predict(None, x).version == 2
            new, named = client.session("letters"), client.session("letters:1")
            same(new.step(x, outputs="all"), second.y)
            same(stream.open("letters:2").step(x), second.y)
            same(named.step(ids, outputs="all"), first.y)
            same(client.predict("letters:1", ids, outputs="all").y, first.y)
            assert (new.version, named.version, new.model, named.model) == (2, 1, "letters", "letters")
            # A repeated creation returns the existing session, whichever version is the newest now.
            again = client.session("letters", session_id="old")
            with again:
                assert (again.version, again.position) == (1, 3)
                again.keep = True
            with pytest.raises(SessionExists):
                client.session("letters:2", session_id="old").step(x)
            wanted = old.step(ids, outputs="all")
            old.set_state(again.state() | first.states)
            remove_version(models, "letters", 1)
            httpx.post(f"{server.url}/models/reload").raise_for_status()
            with Client(server.url) as other, other.stream() as another:  # with empty caches
                same(another.attach("old").step(ids), wanted)
    finally:
        assert server.stop() == 0
