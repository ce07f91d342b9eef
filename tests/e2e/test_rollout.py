"""Sessions that go on by themselves: the same symbols however they come, once each, whatever else goes on."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellserve import AsyncClient, Client
from cellserve.service.sessions.sampling import Sampling, sample
from tests.budgets import examples
from tests.e2e.helpers import create, problem_kind, store_of
from tests.helpers import until
from tests.redis_server import RedisServer
from tests.server import Serve, Server, start_server
from tests.service.strategies import SEEDS

ASKED: dict[str, Any] = {"text": "Alice was", "temperature": 0.8, "top_k": 20, "seed": 7}


@pytest.fixture(scope="module", params=["memory", "lmdb", pytest.param("redis", marks=pytest.mark.long)])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each of the stores; a rollout asks nothing of Redis that steps do not."""
    return store_of(request, tmp_path_factory)


@pytest.fixture(scope="module")
def server(examples: Path, store: str) -> Iterator[Server]:
    """A server of the example models on each of the stores."""
    server = start_server("--models", str(examples), "--store", store)
    yield server
    assert server.stop() == 0


def roll_out(client: httpx.Client, session: str, **body: Any) -> httpx.Response:
    return client.post(f"/sessions/{session}/rollout", json=body)


def events(
    client: httpx.Client, session: str, after: int | None = None, **body: Any
) -> Generator[tuple[str, Any], None, None]:
    """Gives the kind (the id, of a symbol) and the data of each event, while the connection stays open."""
    headers = {"accept": "text/event-stream"} | ({} if after is None else {"last-event-id": str(after)})
    with client.stream("POST", f"/sessions/{session}/rollout", json=body, headers=headers) as answer:
        if answer.status_code != 200:
            answer.read()
            raise AssertionError(answer.text)
        assert answer.headers["content-type"] == "text/event-stream"
        kind = ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name in ("id", "event"):
                kind = value
            elif name == "data":
                yield kind, json.loads(value)


def by_hand(client: httpx.Client, session: str, steps: int, sampling: Sampling, text: str) -> str:
    """Does step by step, over HTTP, what a rollout does by itself."""
    labels = client.get("/models/characters").json()["labels"]
    x, drawn = [labels.index(letter) for letter in text], ""
    while len(drawn) < steps:
        answer = client.post(f"/sessions/{session}/step", json={"x": x, "outputs": "last"}).json()
        x = [sample(np.array(answer["y"], np.float32), False, sampling, answer["position"])]
        drawn += labels[x[0]]
    return drawn


def test_the_text_model_knows_more_than_n_grams(client: httpx.Client) -> None:
    told = client.get("/models/characters").json()
    assert told["rollout"] == "probabilities"
    assert told["metrics"]["bits"] < 2.15 < told["metrics"]["bits_5_grams"]


@pytest.mark.parametrize("sampling", [Sampling(0.8, 20, 7), Sampling(0), Sampling(1.0, None, 123)])
def test_a_rollout_gives_what_stepping_by_hand_gives(client: httpx.Client, sampling: Sampling) -> None:
    asked = {"text": "Alice was", **{name: value for name, value in sampling._asdict().items() if value is not None}}
    session, other = create(client, "characters"), create(client, "characters")
    answer = roll_out(client, session, **asked, steps=60).json()
    assert answer["text"] == by_hand(client, other, 60, sampling, "Alice was")
    assert answer["position"] == 9 + 59 == client.get(f"/sessions/{session}").json()["position"]
    states = [safetensors.numpy.load(client.get(f"/sessions/{one}/state").content) for one in (session, other)]
    assert all(states[0][name].tobytes() == states[1][name].tobytes() for name in states[0])


@settings(max_examples=examples(15, 100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["one", "events", "steps"])), max_size=6),
    data=st.data(),
)
def test_a_rollout_in_parts_gives_the_whole_rollout(
    client: httpx.Client, parts: list[tuple[int, str]], data: st.DataObject
) -> None:
    sampling = Sampling(data.draw(st.sampled_from([0, 0.5, 1, 2])), data.draw(st.integers(1, 80)), data.draw(SEEDS))
    asked, count = sampling._asdict(), sum(steps for steps, _ in parts) + 5
    whole = roll_out(client, create(client, "characters"), text="The", **asked, steps=count).json()
    session, text = create(client, "characters"), "The"
    for steps, way in [*parts, (5, "one")]:
        begin = text if text == "The" else text[-1]
        if way == "steps":
            text += by_hand(client, session, steps, sampling, begin)
        elif way == "events":
            *told, _ = events(client, session, text=begin, **asked, steps=steps)
            text += "".join(one["text"] for _, one in told)
        else:
            text += roll_out(client, session, text=begin, **asked, steps=steps).json()["text"]
    assert text.removeprefix("The") == whole["text"]
    assert client.get(f"/sessions/{session}").json()["position"] == whole["position"]


def test_other_traffic_does_not_change_a_rollout(server: Server, client: httpx.Client) -> None:
    alone = [
        roll_out(client, create(client, "characters"), **{**ASKED, "seed": seed}, steps=80).json()["text"]
        for seed in range(6)
    ]
    together: dict[int, str] = {}

    def go(seed: int) -> None:
        with server.client() as own:
            session = create(own, "characters")
            if seed % 2:
                got = [data["text"] for kind, data in events(own, session, **{**ASKED, "seed": seed}, steps=80)
                       if kind != "end"]  # fmt: skip
                together[seed] = "".join(got)
            else:
                together[seed] = roll_out(own, session, **{**ASKED, "seed": seed}, steps=80).json()["text"]

    threads = [threading.Thread(target=go, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        client.post("/predict", json={"model": "characters", "sequences": [[1, 2, 3] * 20] * 5})
    assert [together[seed] for seed in range(6)] == alone
    assert len(set(alone)) == 6


def test_a_model_with_numeric_outputs_is_continued_with_them(client: httpx.Client) -> None:
    session, other = create(client, "sunspots"), create(client, "sunspots")
    x = [[96.7], [104.3], [116.7]]
    answer = roll_out(client, session, x=x, steps=120).json()
    ys = [client.post(f"/sessions/{other}/step", json={"x": x, "outputs": "last"}).json()["y"]]
    while len(ys) < 120:
        ys.append(client.post(f"/sessions/{other}/step", json={"x": ys[-1]}).json()["y"])
    assert (answer["y"], answer["position"]) == (ys, 122)
    told = list(events(client, create(client, "sunspots"), x=x, steps=120))
    assert [data["y"] for _, data in told[:-1]] == ys


def test_a_rollout_with_a_position_is_applied_once_and_repeated(client: httpx.Client) -> None:
    session = create(client, "characters")
    first = roll_out(client, session, **ASKED, steps=30, position=0)
    again = roll_out(client, session, **ASKED, steps=30, position=0)
    assert "idempotent-replay" not in first.headers
    assert (again.headers["idempotent-replay"], again.json()) == ("true", first.json())
    for other in ({"seed": 8}, {"steps": 31}, {"temperature": 0.9}, {"top_k": 21}, {"text": "Alice is"}):
        refused = roll_out(client, session, **{**ASKED, "steps": 30, "position": 0} | other)
        assert (refused.status_code, problem_kind(refused), refused.json()["position"]) == (
            409,
            "position-conflict",
            38,
        )
    assert problem_kind(roll_out(client, session, **ASKED, steps=3, position=39)) == "session-went-back"
    client.post(f"/sessions/{session}/step", json={"x": 3})
    assert roll_out(client, session, **ASKED, steps=30, position=0).status_code == 409


def test_events_carry_the_rollout_and_positions_as_ids(client: httpx.Client) -> None:
    whole = roll_out(client, create(client, "characters"), **ASKED, steps=25).json()
    session = create(client, "characters")
    *told, (last, end) = events(client, session, **ASKED, steps=25)
    assert [kind for kind, _ in told] == [str(position) for position in range(9, 34)]
    assert [data["position"] for _, data in told] == list(range(9, 34))
    assert "".join(data["text"] for _, data in told) == whole["text"]
    assert [data["symbol"] for _, data in told] == whole["symbols"]
    assert (last, end) == ("end", {"session": session, "position": 33, "durable": whole["durable"]})


def test_a_stream_resumes_after_the_last_event_received(client: httpx.Client) -> None:
    asked = {**ASKED, "steps": 400, "position": 0}
    whole = roll_out(client, create(client, "characters"), **ASKED, steps=400).json()["text"]
    session, text, after = create(client, "characters"), "", None
    for read in (1, 0, 30, 150, 1000):
        with closing(events(client, session, after, **asked)) as stream:
            for kind, data in islice(stream, read):
                if kind == "end":
                    break
                text, after = text + data["text"], int(kind)
    assert text == whole
    assert client.get(f"/sessions/{session}").json()["position"] == 9 + 399
    assert [kind for kind, _ in events(client, session, after, **asked)] == ["end"]
    assert "".join(data.get("text", "") for _, data in events(client, session, **asked)) == whole


def test_a_repeated_stream_resumes_and_applies_no_symbol_twice(client: httpx.Client, server: Server) -> None:
    asked = {**ASKED, "steps": 1500, "position": 0}
    session = create(client, "characters")
    with server.client() as other, closing(events(other, session, **asked)) as older:
        first = next(older)  # it is not read on, as where the network is gone
        *told, last = events(client, session, **asked)
        rest = list(older)
    assert (last[0], last[1]["position"]) == ("end", 9 + 1499)
    assert [kind for kind, _ in told] == [str(position) for position in range(9, 9 + 1500)]
    assert [first, *rest][:-1] == told[: len(rest)]
    if rest[-1][0] != "end":
        assert (rest[-1][0], rest[-1][1]["status"]) == ("problem", 409)


def test_a_rollout_outlives_a_restart(examples: Path, serve: Serve, tmp_path: Path) -> None:
    flags = "--models", str(examples), "--store", f"lmdb:{tmp_path / 'store'}"
    server, asked = serve(*flags), {**ASKED, "position": 0}
    with server.client() as client:
        plain, streamed = create(client, "characters"), create(client, "characters")
        first = roll_out(client, plain, **asked, steps=30).json()
        with closing(events(client, streamed, **asked, steps=1000)) as stream:
            text = "".join(data["text"] for _, data in islice(stream, 20))
    assert server.stop() == 0
    with serve(*flags).client() as client:
        assert roll_out(client, plain, **asked, steps=30).json() == first
        reached = client.get(f"/sessions/{streamed}").json()["position"]
        text += "".join(data.get("text", "") for _, data in events(client, streamed, 28, **asked, steps=1000))
        whole = roll_out(client, create(client, "characters"), **ASKED, steps=1000).json()["text"]
    assert 28 <= reached < 1008
    assert text == whole


def test_a_server_that_stops_ends_its_streams_at_once(examples: Path, serve: Serve, redis: RedisServer) -> None:
    flags = "--models", str(examples), "--store", redis.url, "--max-rollout-steps", "1000000"
    asked, server = {**ASKED, "steps": 1_000_000, "position": 0}, serve(*flags, "--shutdown-seconds", "600")
    with server.client() as client, server.client() as other:
        session, slow = create(client, "characters"), create(client, "characters")
        with closing(events(other, slow, **asked)) as unread:
            next(unread)
            stream = events(client, session, **asked)
            told = [next(stream)]
            server.process.terminate()
            told += stream
            assert server.stop() == 0
    kind, problem = told[-1]
    assert (kind, problem["status"]) == ("problem", 503)
    assert problem["type"].endswith(":stopping")
    with serve(*flags).client() as client:
        after = int(told[-2][0])
        assert client.get(f"/sessions/{session}").json()["position"] == after
        with closing(events(client, session, after, **asked)) as stream:
            assert [int(kind) for kind, _ in islice(stream, 3)] == [after + 1, after + 2, after + 3]


def test_a_step_ends_the_sessions_stream_without_waiting(client: httpx.Client, server: Server) -> None:
    session = create(client, "characters")
    with server.client() as other, closing(events(other, session, **ASKED, steps=4096)) as stream:
        next(stream)  # and nobody reads on
        stepped = client.post(f"/sessions/{session}/step", json={"x": 3})
        assert stepped.status_code == 200
        if stepped.json()["position"] < 4000:
            assert [kind for kind, _ in stream][-1] == "problem"


def test_a_session_continues_after_its_client_has_left(client: httpx.Client, server: Server) -> None:
    session = create(client, "characters")
    with pytest.raises(httpx.ReadTimeout), server.client() as other:
        other.post(f"/sessions/{session}/rollout", json={**ASKED, "steps": 4096}, timeout=httpx.Timeout(60, read=0.02))
    # The server may have read the next request before it saw the end of that connection.
    answer = until(
        lambda: client.post(f"/sessions/{session}/step", json={"x": 3, "position": 0}),
        lambda answer: answer.status_code != 409,
    )
    assert answer.status_code == 200  # nothing of the rollout has been applied
    assert answer.json()["position"] == 1


@pytest.mark.long
def test_a_killed_server_loses_no_symbol_of_a_stream(examples: Path, serve: Serve, redis: RedisServer) -> None:
    flags = "--models", str(examples), "--store", redis.url
    asked = {**ASKED, "steps": 600, "position": 0}
    server, text, after = serve(*flags), "", None
    with server.client() as client:
        session = create(client, "characters")
        with pytest.raises(httpx.TransportError):
            for kind, data in events(client, session, **asked):
                text, after = text + data["text"], int(kind)
                if len(text) == 40:
                    server.stop(signal.SIGKILL)
    with serve(*flags).client() as client:
        reached = client.get(f"/sessions/{session}").json()["position"]
        assert after is not None and after <= reached < 608
        for kind, data in events(client, session, after, **asked):
            if kind != "end":
                text += data["text"]
                assert int(kind) == 8 + len(text)
        whole = roll_out(client, create(client, "characters"), **ASKED, steps=600).json()["text"]
    assert text == whole


def test_the_python_client_rolls_out(server: Server, client: httpx.Client) -> None:
    told = roll_out(client, create(client, "characters"), **ASKED, steps=30).json()
    x = [[96.7], [104.3]]
    values = roll_out(client, create(client, "sunspots"), x=x, steps=5).json()
    with Client(server.url) as own, own.session("characters") as session, own.session("sunspots") as months:
        first = session.rollout("Alice was", 10, temperature=0.8, top_k=20, seed=7)
        assert first.symbols is not None and session.position == 9 + 9
        rest = session.rollout(first.symbols[-1], 20, temperature=0.8, top_k=20, seed=7)
        assert (first.text or "") + (rest.text or "") == told["text"]
        given = months.rollout(x, 5)
        assert given.y is not None and given.y.tolist() == np.array(values["y"], np.float32).tolist()

    async def other_form() -> str | None:
        async with AsyncClient(server.url) as own, own.session("characters") as session:
            return (await session.rollout("Alice was", 30, temperature=0.8, top_k=20, seed=7)).text

    assert asyncio.run(other_form()) == told["text"]


@pytest.mark.parametrize(
    ("body", "status", "place"),
    [
        ({"text": "a"}, 422, "steps"),
        ({"text": "a", "steps": 0}, 422, "steps"),
        ({"text": "a", "steps": 4097}, 422, "steps"),
        ({"text": "a", "steps": 1.5}, 422, "steps"),
        ({"steps": 3}, 422, "x"),
        ({"steps": 3, "text": "a", "x": 1}, 422, "x"),
        ({"steps": 3, "text": ""}, 422, "text"),
        ({"steps": 3, "text": "caf\u00e9"}, 422, "text[3]"),
        ({"steps": 3, "x": 70}, 422, "x"),
        ({"steps": 3, "x": [1, -1]}, 422, "x[1]"),
        ({"steps": 3, "x": []}, 422, "x"),
        ({"steps": 3, "text": "a", "temperature": -0.1}, 422, "temperature"),
        ({"steps": 3, "text": "a", "top_k": 0}, 422, "top_k"),
        ({"steps": 3, "text": "a", "seed": -1}, 422, "seed"),
        ({"steps": 3, "text": "a", "seed": 2**64}, 422, "seed"),
        ({"steps": 3, "text": "a", "position": -1}, 422, "position"),
        ({"steps": 3, "text": "a", "beam": 4}, 422, "beam"),
    ],
)
def test_a_bad_rollout_is_refused_with_the_place_and_changes_nothing(
    client: httpx.Client, body: dict[str, Any], status: int, place: str
) -> None:
    session = create(client, "characters")
    for streamed in ({}, {"stream": True}):
        refused = roll_out(client, session, **body, **streamed)
        assert (refused.status_code, refused.json()["place"]) == (status, place), refused.text
    assert client.get(f"/sessions/{session}").json()["position"] == 0


def test_models_and_sessions_that_cannot_roll_out_say_so(client: httpx.Client) -> None:
    vowels, sunspots = create(client, "vowels"), create(client, "sunspots")
    assert problem_kind(roll_out(client, vowels, x=[0.0] * 12, steps=3)) == "cannot-roll-out"
    assert roll_out(client, sunspots, x=[1.0], steps=3, seed=1).json()["place"] == "seed"
    assert roll_out(client, sunspots, text="1", steps=3).json()["place"] == "text"
    assert roll_out(client, "nobody", x=[1.0], steps=3).status_code == 404
    assert client.get(f"/sessions/{vowels}/rollout").status_code == 405
    session = create(client, "characters")
    for header, body in (("x", {"position": 0}), ("3", {})):
        content = {**ASKED, "steps": 3, "stream": True, **body}
        headers = {"last-event-id": header}
        assert client.post(f"/sessions/{session}/rollout", json=content, headers=headers).status_code == 422
    client.delete(f"/sessions/{session}")
    assert roll_out(client, session, **ASKED, steps=3).status_code == 410
