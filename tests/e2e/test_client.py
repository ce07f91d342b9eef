"""The Python client, for threads and for asyncio, against a real server: NumPy in and NumPy out, bit for bit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellserve import AsyncClient, Client, Retry
from cellserve.errors import (
    InvalidInput,
    PositionConflict,
    RetriesExhausted,
    SessionExists,
    SessionGone,
    StateOfAnotherModel,
    StepsFailed,
    Unauthorized,
    UnknownModel,
    UnknownSession,
)
from cellserve.tensors import Array
from tests.e2e.helpers import inputs, new_key, predict_all
from tests.helpers import FEATURES, OUTPUTS
from tests.server import Serve, Server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_sequences_of_different_lengths_are_predicted_from_given_states(client: Client) -> None:
    x = inputs(3, 12)
    wholes = client.predict("lstm", list(x), outputs="all", return_states=True)
    assert [y.shape for y in wholes.y] == [(12, OUTPUTS)] * 3
    assert wholes.states is not None and wholes.model == "lstm" and wholes.version == 1
    begun = client.predict("lstm", [x[0, :5], x[1, :9], x[2, :1]], outputs="all", return_states=True)
    rest = [x[0, 5:], x[1, 9:], x[2, 1:]]
    ended = client.predict("lstm", rest, outputs="all", states=begun.states, return_states=True)
    for row in range(3):
        assert np.concatenate([begun.y[row], ended.y[row]]).tobytes() == wholes.y[row].tobytes()
        for name, state in wholes.states[row].items():
            assert ended.states is not None and ended.states[row][name].tobytes() == state.tobytes()
    last = client.predict("lstm", list(x), outputs="last")
    assert (np.stack(last.y) == np.stack(wholes.y)[:, -1]).all() and last.states is None
    assert begun.states is not None
    mixed = client.predict("lstm", [x[0, 5:], x[1]], outputs="all", states=[begun.states[0], None])
    assert (mixed.y[0] == wholes.y[0][5:]).all() and (mixed.y[1] == wholes.y[1]).all()


def test_a_sequence_of_a_wrong_shape_is_reported_by_its_place_and_what_to_give(client: Client) -> None:
    x = inputs(3, 7)
    for sequences, told in (
        (x, r"sequences: its shape is \[3, 7, 5\]: give \[time, 5\]: one array is one sequence.*list\(x\)"),
        (x[0, :, :4], r"sequences: its shape is \[7, 4\]: give \[time, 5\]$"),
        ([x[0, :, :4], x[1, :2, :4]], r"sequences\[0\]: its shape is \[7, 4\]: give \[time, 5\]$"),
        (x[0].astype(int)[:, :1], r"sequences: its shape is \[7, 1\]: give"),
    ):
        with pytest.raises(InvalidInput, match=told):
            client.predict("lstm", sequences)
    with pytest.raises(InvalidInput, match="finite"):  # nothing is wrong with its shape
        client.predict("lstm", x[0] * np.nan)


def test_one_sequence_gives_one_prediction(client: Client) -> None:
    x = inputs(9)
    one = client.predict("lstm", x, outputs="all", return_states=True)
    many = client.predict("lstm", [x.tolist()], outputs="all")
    assert one.y.tobytes() == many.y[0].tobytes()
    rest = client.predict("lstm", x, states=one.states)
    assert rest.y.shape == (OUTPUTS,) or rest.y.shape == (9, OUTPUTS)


def test_steps_equal_one_prediction_bit_for_bit_and_the_session_is_deleted_at_the_end(client: Client) -> None:
    x = inputs(20)
    with client.session("lstm") as session:
        ys = [session.step(row)[None] for row in x[:7]]
        assert (ys[0].shape, ys[0].dtype) == ((1, OUTPUTS), np.float32)
        ys.append(session.step(x[7:12], outputs="all"))
        assert session.position == 12
        fork = session.fork()
        assert (fork.position, fork.model) == (12, "lstm")
        ys.append(session.step(x[12:].tolist(), outputs="all"))
        assert np.concatenate(ys).tobytes() == predict_all(client, x).tobytes()
        assert (
            session.step(x[:4], outputs="last").tobytes()
            == predict_all(client, np.concatenate([x, x[:4]]))[-1].tobytes()
        )
        assert np.array_equal(fork.step(x[12:], outputs="all"), ys[-1])
    with pytest.raises(SessionGone):
        session.step(x[0])
    fork.delete()
    fork.delete()  # may be repeated


def test_a_state_can_be_read_set_and_reset(client: Client) -> None:
    x = inputs(10)
    with client.session("lstm") as session, client.session("rnn") as other:
        session.step(x[:6])
        state = session.state()
        assert (state.metadata["model"], state.metadata["position"]) == ("lstm", "6")
        rest = session.step(x[6:], outputs="all")
        session.set_state(state)
        assert session.position == 11
        assert np.array_equal(session.step(x[6:], outputs="all"), rest)
        session.reset()
        assert session.position == 16
        assert not any(tensor.any() for tensor in session.state().values())
        with client.session("lstm", states=state) as begun:
            assert np.array_equal(begun.step(x[6:], outputs="all"), rest)
        with pytest.raises((StateOfAnotherModel, InvalidInput)):
            other.set_state(state)


def test_a_kept_session_can_be_attached_again(client: Client) -> None:
    x = inputs(5)
    with client.session("rnn", session_id="mine", keep=True) as session:
        ys = [session.step(row) for row in x[:3]]
    with client.attach("mine") as again:
        assert again.position == 3
        ys += [again.step(row) for row in x[3:]]
    assert np.stack(ys).tobytes() == predict_all(client, x, "rnn").tobytes()
    assert client.attach("mine").refresh() == 5
    with pytest.raises(SessionExists):
        client.session("lstm", session_id="mine").step(x[0])
    client.attach("mine").delete()


def test_models_are_listed_and_described(client: Client) -> None:
    assert {"lstm", "rnn"} <= {model["name"] for model in client.models()}
    assert client.model("lstm")["signature"]["inputs"][0]["shape"] == [FEATURES]
    assert client.ready()
    with pytest.raises(UnknownModel):
        client.model("none")


def test_each_refusal_is_raised_as_its_own_exception(client: Client) -> None:
    with pytest.raises(UnknownModel) as unknown:
        client.predict("none", inputs(2))
    assert (unknown.value.status, unknown.value.type) == (404, "urn:cellserve:problem:unknown-model")
    with pytest.raises(UnknownSession), client.attach("never"):
        pass
    with client.session("lstm") as session:
        bad: list[Any] = [np.zeros(FEATURES + 1), np.full(FEATURES, np.nan), np.full(FEATURES, 1e300), []]
        for x in bad:
            with pytest.raises(InvalidInput) as refused:
                session.step(x)
            assert refused.value.extensions["place"].startswith("x")
        assert session.position == 0
    for wrong in ([], [np.zeros(3), np.zeros((3, FEATURES))]):
        with pytest.raises(ValueError, match="sequences"):
            client.predict("lstm", wrong)
    with pytest.raises(ValueError, match="url"):
        Client("localhost:8000")


def test_a_session_moved_by_somebody_else_is_detected(client: Client) -> None:
    x = inputs(3)
    with client.session("lstm") as session:
        session.step(x[0])
        with client.attach(session.id) as other:
            other.step(x[1])
        with pytest.raises(PositionConflict) as conflict:
            session.step(x[2])
        assert (conflict.value.position, session.position) == (2, 1)
        assert session.refresh() == 2
        assert np.array_equal(session.step(x[2]), predict_all(client, x)[2])


def test_threads_that_share_a_session_take_turns(client: Client) -> None:
    with client.session("lstm") as session:
        threads = [threading.Thread(target=lambda: [session.step(inputs()) for _ in range(5)]) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.position == 30
        assert np.array_equal(
            session.step(inputs()),
            predict_all(client, np.broadcast_to(inputs(), (31, FEATURES)))[-1],
        )


def test_an_error_in_the_with_block_is_raised_even_if_the_deletion_fails() -> None:
    client = Client("http://127.0.0.1:9", retry=Retry(seconds=0))
    session = client.attach("away")
    session.keep, session._record.position = False, 0
    with pytest.raises(KeyError), session:
        raise KeyError("the caller's own")
    with pytest.raises(RetriesExhausted), session:
        pass


def test_a_stream_steps_hundreds_of_sessions_bit_for_bit(client: Client) -> None:
    x = inputs(300, 8)
    with client.stream() as stream:
        sessions = [stream.open("lstm") for _ in x]
        ys = [stream.step(sessions, x[:, time]) for time in range(3)]
        assert ys[0].shape == (300, OUTPUTS)
        ys = [np.stack(ys, 1), stream.step(sessions, x[:, 3:])]
        y = np.concatenate(ys, 1)
        assert [session.position for session in sessions] == [8] * 300
        assert y.tobytes() == np.stack(predict_all(client, list(x))).tobytes()
        one = sessions[0]
        more = [one.step(x[1, 0])[None], one.step(x[1, 1:4]), one.step(x[1, 4:], outputs="last")[None]]
        alone = predict_all(client, np.concatenate([x[0], x[1]]))
        assert np.concatenate(more).tobytes() == np.delete(alone[8:], [4, 5, 6], 0).tobytes()
        one.reset()  # over HTTP, on the same session
        assert np.array_equal(one.step(x[0, 0]), y[0, 0])
        assert one.position == 18
        fork = stream.attach(one.fork().id)
        assert np.array_equal(fork.step(x[0, 1]), y[0, 1])
        sessions[1].keep = True
    fork.delete()
    with pytest.raises(SessionGone):
        one.refresh()
    assert sessions[1].refresh() == 8
    sessions[1].delete()


def test_failures_of_some_sessions_of_a_frame_are_reported_by_row(client: Client) -> None:
    x = inputs(4, 2)
    with client.stream() as stream:
        sessions = [stream.open("lstm") for _ in x]
        y = stream.step(sessions, x[:, 0])
        sessions[1].delete()
        assert sessions[1].id not in stream._to_delete  # otherwise a long-lived stream would collect deleted sessions
        with client.attach(sessions[3].id) as other:
            other.step(x[0, 1])
        with pytest.raises(StepsFailed, match="2 of 4") as failed:
            stream.step(sessions, x[:, 1])
        assert [type(failed.value.failures[row]) for row in sorted(failed.value.failures)] == [
            SessionGone,
            PositionConflict,
        ]
        assert [session.position for session in sessions] == [2, 1, 2, 1]
        wholes = np.stack(predict_all(client, list(x)))
        assert np.array_equal(y, wholes[:, 0])
        assert np.array_equal(failed.value.y[[0, 2]], wholes[[0, 2], 1:])
        for _ in range(2):
            with pytest.raises(SessionGone):
                sessions[1].step(x[1, 1])
        for wrong in (x[:3, 0], x[0, 0], x[:, :0]):
            with pytest.raises(ValueError, match="x: its shape"):
                stream.step(sessions, wrong)
        with pytest.raises(ValueError, match="twice"):
            stream.step([sessions[0], sessions[0]], x[:2, 0])
        with pytest.raises(InvalidInput):
            stream.step([sessions[0]], np.full((1, FEATURES), np.inf))
        with pytest.raises(InvalidInput, match="several models"):
            stream.step([sessions[0], stream.open("rnn")], x[:2, 0])
        with pytest.raises(UnknownModel):
            stream.open("none").step(x[0, 0])
        with pytest.raises(UnknownSession):
            stream.attach("never").step(x[0, 0])


def test_the_asyncio_client_gives_what_the_synchronous_one_gives(server: Server, client: Client) -> None:
    x = inputs(40, 6)
    wholes = client.predict("lstm", list(x), outputs="all")

    async def main() -> None:
        async with AsyncClient(server.url) as mine:
            assert await mine.ready()
            assert await mine.models() == client.models()
            assert await mine.model("lstm") == client.model("lstm")
            predicted = await mine.predict("lstm", list(x), outputs="all", return_states=True)
            assert np.array_equal(np.stack(predicted.y), np.stack(wholes.y))
            async with mine.session("lstm") as session:
                together = await asyncio.gather(*(session.step(row) for row in x[0, :4]))  # they take turns
                fork = await session.fork()
                rest = await session.step(x[0, 4:], outputs="all")
                assert np.array_equal(np.concatenate([np.stack(together), rest]), wholes.y[0])
                state = await session.state()
                await session.reset()
                assert (session.position, await session.refresh()) == (7, 7)
                await fork.set_state(state)
                await fork.delete()
            async with mine.session("lstm", state) as begun:
                await begun.step(x[0])
            async with mine.stream() as stream:
                sessions = [stream.open("lstm") for _ in x]

                async def alone(row: int) -> Array:
                    return np.stack([await sessions[row].step(one) for one in x[row, :4]])

                ys = np.stack(await asyncio.gather(*map(alone, range(len(x)))))
                ys = np.concatenate([ys, await stream.step(sessions, x[:, 4:])], 1)
                assert ys.tobytes() == np.stack(wholes.y).tobytes()
                twice = await asyncio.gather(*(stream.step(sessions[:9], x[:9, time]) for time in range(6)))
                assert np.stack(twice, 1).shape == (9, 6, OUTPUTS)
                assert (await stream.attach(sessions[9].id).step(x[9])).shape == (6, OUTPUTS)
            with pytest.raises(SessionGone):
                await sessions[0].refresh()

    asyncio.run(main())
    with client.session("lstm") as session:
        assert client.attach(session.id).refresh() == 0


def test_the_key_is_sent_over_http_and_websocket(repository: Path, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    key = new_key("alice", file)
    server = serve("--models", str(repository), "--api-keys-file", str(file))
    x = inputs(2)
    with Client(server.url, key) as client, client.stream() as stream, client.session("lstm") as session:
        assert np.array_equal(session.step(x, outputs="all"), stream.open("lstm").step(x))
    for wrong in (None, "wrong"):
        uses: list[Callable[[Client], object]] = [lambda c: c.models(), lambda c: c.session("lstm").step(x)]
        for use in uses:
            with pytest.raises(Unauthorized), Client(server.url, wrong) as client:
                use(client)
    with pytest.raises(Unauthorized), Client(server.url, "wrong") as client:
        client.stream().open("lstm").step(x)
