"""The Python client under faults: answers that are lost, cut or late, a server that is busy or killed."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cellserve import AsyncClient, Client, Retry
from cellserve.errors import (
    AnswerTooLarge,
    ConnectionLost,
    NeverReached,
    PositionConflict,
    RetriesExhausted,
    ServerProblem,
    SessionWentBack,
    UnknownSession,
)
from cellserve.tensors import Array
from tests.e2e.helpers import QUICK, SHORT, inputs, killed_again_and_again, predict_all
from tests.faulty_proxy import DELAY_SECONDS, FaultyProxy
from tests.helpers import OUTPUTS, free_port
from tests.redis_server import RedisServer
from tests.server import Serve, Server

FAULTS = ("lose", "cut", "delay", "busy", "bad gateway")


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(server.url)
    yield proxy
    proxy.close()


def mishaps(count: int) -> list[str]:
    """Returns each fault twice, shuffled among requests without a fault."""
    faults = [*FAULTS * 2, *["none"] * (count - 2 * len(FAULTS))]
    random.Random(7).shuffle(faults)
    return faults


def test_each_step_is_applied_once_through_all_faults(server: Server, proxy: FaultyProxy) -> None:
    x = inputs(40)
    proxy.faults.extend(mishaps(28))
    with Client(proxy.url, timeout=SHORT, retry=QUICK) as client, client.session("lstm") as session:
        ys = [session.step(row)[None] for row in x[:20]]
        fork = session.fork()
        ys += [session.step(x[at : at + 4], outputs="all") for at in range(20, 40, 4)]
        state = fork.state()
        fork.reset()
        fork.set_state(state)
        assert (session.position, fork.position) == (40, 22)
        assert np.array_equal(fork.step(x[20:], outputs="all"), np.concatenate(ys[20:]))
        fork.delete()
        assert set(proxy.done) >= {*FAULTS}
        proxy.faults.clear()
        with Client(server.url) as plain:
            assert plain.attach(session.id).refresh() == 40
            assert np.concatenate(ys).tobytes() == predict_all(plain, x).tobytes()


def test_a_server_that_was_never_reached_is_given_up_within_3_seconds_on_every_surface() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    told = f"{url}: .*; the server was never reached: does it run, and is this its URL"

    async def main() -> None:
        async with AsyncClient(url) as client:
            await client.models()

    with Client(url) as client:
        stream = client.stream()
        calls: list[Callable[[], object]] = [
            client.models,
            client.session("lstm").refresh,
            lambda: stream.step([stream.open("lstm")], inputs(1)),
            lambda: asyncio.run(main()),
        ]
        for call in calls:
            with pytest.raises(RetriesExhausted, match=told) as exhausted:
                call()
            assert isinstance(exhausted.value.__cause__, NeverReached)
            assert exhausted.value.seconds < 3


def test_the_asyncio_client_steps_a_session_once_whatever_happens_on_the_way(
    server: Server, proxy: FaultyProxy
) -> None:
    x = inputs(6, 8)
    proxy.faults.extend(mishaps(40))

    async def main() -> None:
        async with AsyncClient(proxy.url, timeout=SHORT, retry=QUICK) as client:

            async def one(row: int) -> Array:
                async with client.session("lstm") as session:
                    return np.stack([await session.step(frame) for frame in x[row]])

            ys = np.stack(await asyncio.gather(*map(one, range(len(x)))))
            with Client(server.url) as plain:
                assert ys.tobytes() == np.stack(predict_all(plain, list(x))).tobytes()

    asyncio.run(main())
    assert set(proxy.done) >= {*FAULTS}


def test_a_stream_reconnects_and_resends_what_had_no_answer(server: Server, proxy: FaultyProxy) -> None:
    x = inputs(50, 8)
    # The faults of the frame of each step, and of the handshakes after it.
    plan = [[], ["lose"], ["cut"], ["delay"], [], ["lose", "busy"], ["cut", "bad gateway", "lose"], ["lose", "cut"]]
    with Client(proxy.url, timeout=SHORT, retry=QUICK) as client, client.stream() as stream:
        sessions = [stream.open("lstm") for _ in x]
        outputs = []
        for time, faults in enumerate(plan):
            proxy.faults.extend(faults)
            outputs.append(stream.step(sessions, x[:, time]))
            assert not proxy.faults
        ys = np.stack(outputs, 1)
        assert [session.position for session in sessions] == [len(plan)] * len(x)
        assert set(proxy.done) >= {*FAULTS}
        with Client(server.url) as plain:
            assert ys.tobytes() == np.stack(predict_all(plain, list(x))).tobytes()
            assert {plain.attach(session.id).refresh() for session in sessions} == {len(plan)}


def test_an_asyncio_stream_reconnects_and_resends_many_frames_in_flight(server: Server, proxy: FaultyProxy) -> None:
    x = inputs(30, 10)
    proxy.faults.extend(["none"] * 5 + ["lose", "none", "none", "none", "cut"] * 3 + ["none"] * 10 + ["delay"])

    async def main() -> None:
        async with AsyncClient(proxy.url, timeout=SHORT, retry=QUICK) as client, client.stream() as stream:

            async def one(row: int) -> Array:
                session = stream.open("lstm")
                return np.stack([await session.step(frame) for frame in x[row]])

            ys = np.stack(await asyncio.gather(*map(one, range(len(x)))))
            with Client(server.url) as plain:
                assert ys.tobytes() == np.stack(predict_all(plain, list(x))).tobytes()

    asyncio.run(main())
    assert set(proxy.done) >= {"lose", "cut", "delay"}


def test_a_client_that_gives_up_raises_one_exception_and_knows_the_position(server: Server, proxy: FaultyProxy) -> None:
    x = inputs(4)
    with Client(proxy.url, retry=Retry(attempts=3, first=0.01)) as client:
        session = client.session("lstm")
        ys = [session.step(x[0])]
        proxy.faults.extend(["lose"] * 3)
        with pytest.raises(RetriesExhausted, match="after 3 attempts") as exhausted:
            session.step(x[1])
        assert (exhausted.value.attempts, session.position) == (3, 1)
        assert isinstance(exhausted.value.__cause__, ConnectionLost)
        ys.append(session.step(x[1]))  # the same again: it had been applied, so its answer is repeated
        assert session.position == 2
        proxy.faults.extend(["lose"] * 3)
        with pytest.raises(RetriesExhausted):
            session.step(x[2])
        with pytest.raises(PositionConflict):
            session.step(x[3])  # another step than the one that was applied
        assert session.refresh() == 3
        ys.append(session.step(x[3]))
        wholes = predict_all(client, x)
        assert np.array_equal(np.stack(ys), wholes[[0, 1, 3]])
        proxy.faults.extend(["busy"] * 3)
        hasty = Client(proxy.url, retry=Retry(seconds=0.5))
        with hasty, pytest.raises(RetriesExhausted, match="busy") as busy:
            hasty.predict("lstm", x)
        assert isinstance(busy.value.__cause__, ServerProblem) and busy.value.__cause__.retry_after == 1
        proxy.faults.clear()
        with client.stream() as stream:
            streamed = stream.attach(session.id)
            assert np.array_equal(streamed.step(x[0]), predict_all(client, np.concatenate([x, x[:1]]))[-1])
            proxy.faults.extend(["lose"] * 9)
            with pytest.raises(RetriesExhausted, match="after 3 attempts"):
                streamed.step(x[1])
            proxy.faults.clear()
            assert streamed.position == 5
            assert np.array_equal(streamed.step(x[1]), predict_all(client, np.concatenate([x, x[:2]]))[-1])
            assert (streamed.position, session.refresh()) == (6, 6)


def test_a_cancelled_step_can_be_sent_again(server: Server, proxy: FaultyProxy) -> None:
    x = inputs(2)

    async def main() -> None:
        async with AsyncClient(proxy.url, retry=QUICK) as client, client.stream() as stream:
            for session in (client.session("lstm"), stream.open("lstm")):
                y = [await session.step(x[0])]
                proxy.faults.append("delay")
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(DELAY_SECONDS / 4):
                        await session.step(x[1])
                assert session.position == 1
                y.append(await session.step(x[1]))
                assert session.position == 2
                with Client(server.url) as plain:
                    assert np.stack(y).tobytes() == predict_all(plain, x).tobytes()

    asyncio.run(main())


def test_a_session_continues_when_its_server_is_killed(repository: Path, serve: Serve, redis: RedisServer) -> None:
    with killed_again_and_again(repository, serve, redis) as (url, is_over), Client(url, retry=QUICK) as client:
        x = inputs(4000)
        ys: list[Array] = []
        with client.session("lstm") as session:
            while not is_over() or len(ys) < 100:
                ys.append(session.step(x[len(ys) % len(x)]))
            x = np.concatenate([x] * (len(ys) // len(x) + 1))[: len(ys)]
            assert session.position == session.refresh() == len(ys)
            last = client.predict("lstm", x, outputs="all", return_states=True)
            assert np.stack(ys).tobytes() == last.y.tobytes()
            assert {name: state.tobytes() for name, state in session.state().items()} == {
                name: state.tobytes() for name, state in (last.states or {}).items()
            }


@pytest.mark.long
def test_sessions_of_a_stream_continue_when_their_server_is_killed(
    repository: Path, serve: Serve, redis: RedisServer
) -> None:
    with killed_again_and_again(repository, serve, redis) as (url, is_over), Client(url, retry=QUICK) as client:
        x = inputs(20, 500)
        ys: list[Array] = []
        with client.stream() as stream:
            sessions = [stream.open("lstm") for _ in x]
            while not is_over() or len(ys) < 20:
                ys.append(stream.step(sessions, x[:, len(ys) % 500]))
            y = np.stack(ys, 1)
            assert {session.position for session in sessions} == {len(ys)}
            x = np.concatenate([x] * (len(ys) // 500 + 1), 1)[:, : len(ys)]
            assert y.tobytes() == np.stack(predict_all(client, list(x))).tobytes()
            assert {session.refresh() for session in sessions} == {len(ys)}


@pytest.mark.long
def test_tasks_continue_when_their_server_is_killed(repository: Path, serve: Serve, redis: RedisServer) -> None:
    async def main(url: str, is_over: Callable[[], bool]) -> tuple[list[Array], list[Array]]:
        xs, ys = [], []
        async with AsyncClient(url, retry=QUICK) as client, client.stream() as stream:

            async def one(number: int) -> None:
                x = inputs(100, seed=number)
                session = stream.open("lstm") if number % 2 else client.session("lstm")
                y: list[Array] = []
                while not is_over() or not y:
                    y.append(await session.step(x[len(y) % 100]))
                assert session.position == len(y)
                await session.delete()
                xs.append(np.concatenate([x] * (len(y) // 100 + 1))[: len(y)])
                ys.append(np.stack(y))

            await asyncio.gather(*map(one, range(8)))
        return xs, ys

    with killed_again_and_again(repository, serve, redis) as (url, is_over):
        xs, ys = asyncio.run(main(url, is_over))
        with Client(url, retry=QUICK) as client:
            wholes = predict_all(client, xs)
        assert [y.tobytes() for y in ys] == [y.tobytes() for y in wholes]


def test_a_server_that_has_lost_a_session_is_detected(repository: Path, serve: Serve, tmp_path: Path) -> None:
    port = ("--port", str(free_port()))
    server = serve("--models", str(repository), *port)
    x = inputs(3)
    with Client(server.url, retry=QUICK) as client, client.stream() as stream:
        session, streamed = client.session("lstm", keep=True), stream.open("lstm", keep=True)
        session.step(x)
        streamed.step(x)
        server.stop(signal.SIGKILL)
        serve("--models", str(repository), *port)
        for one in (session, streamed):
            with pytest.raises(UnknownSession):
                one.step(x)


def test_a_store_that_has_gone_back_is_detected(repository: Path, serve: Serve, tmp_path: Path) -> None:
    store, backup = tmp_path / "store", tmp_path / "backup"
    flags = "--models", str(repository), "--store", f"lmdb:{store}", "--port", str(free_port())
    server = serve(*flags)
    x = inputs(6)
    with Client(server.url, retry=QUICK) as client, client.session("lstm") as session:
        session.step(x[:2])
        assert server.stop() == 0
        shutil.copytree(store, backup)
        server = serve(*flags)
        ys = [session.step(x[2:4], outputs="all")]
        server.stop(signal.SIGKILL)
        shutil.rmtree(store)
        backup.rename(store)
        serve(*flags)
        with pytest.raises(SessionWentBack) as back:
            session.step(x[4:])
        assert (back.value.position, session.position, session.refresh()) == (2, 4, 2)
        assert np.array_equal(session.step(x[2:4], outputs="all"), ys[0])
        assert np.array_equal(session.step(x[4:], outputs="all"), predict_all(client, x)[4:])
        assert ys[0].shape == (2, OUTPUTS)


def test_an_answer_that_is_too_large_is_not_read(server: Server) -> None:
    x = inputs(200)
    with Client(server.url, max_answer_bytes=2000) as client, client.session("lstm") as session:
        with pytest.raises(AnswerTooLarge, match=r"more than 2000 bytes.*max_answer_bytes"):
            client.predict("lstm", x, outputs="all")
        y = session.step(x[0])  # the connection, and the client, go on
        with client.stream() as stream, pytest.raises(AnswerTooLarge):
            stream.step([session], x[None, 1:], outputs="all")
        assert y.shape == (OUTPUTS,)

    async def main() -> None:
        async with AsyncClient(server.url, max_answer_bytes=2000) as client, client.session("lstm") as session:
            with pytest.raises(AnswerTooLarge):
                await client.predict("lstm", x, outputs="all")
            async with client.stream() as stream:
                with pytest.raises(AnswerTooLarge):
                    await stream.step([session], x[None], outputs="all")

    asyncio.run(main())
