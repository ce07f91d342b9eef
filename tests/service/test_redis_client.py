"""The Redis client against a real Redis: what it refuses at the start, whose clock rules, replies that do not fit."""

from __future__ import annotations

import asyncio
import hashlib
import re
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellserve.service.context import check_store
from cellserve.service.errors import StoreUnavailable
from cellserve.service.sessions.session import NO_LIMITS, ClientLimits, Room, SessionSummary
from cellserve.service.sessions.stores import redis_scripts as scripts
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.sessions.stores.records import (
    ConditionalWrites,
    SessionRecord,
    StoredAnswer,
    UnreadableRecord,
    VersionStamp,
    WriteOutcome,
)
from cellserve.service.sessions.stores.redis_client import RedisClient
from cellserve.service.sessions.stores.redis_reader import RedisReader
from cellserve.service.settings import Settings
from tests.helpers import ROOT, free_port, until
from tests.redis_server import RedisServer

DIGEST = "0" * 64
STAMP = VersionStamp(3, bytes(range(16)))
_DOCS = (ROOT / "docs/how-to/deployment.md").read_text()
COMMANDS = " ".join(re.findall(r"[+]\S+", _DOCS.partition("~cellserve:* ")[2].partition("```")[0]))


@pytest.fixture
def clean(redis: RedisServer) -> Iterator[RedisServer]:
    redis.flush()
    yield redis
    for command in ("CONFIG SET maxmemory 0", "REPLICAOF NO ONE", "ACL DELUSER limited"):
        redis.ask(command)


def room(sessions: int) -> Room:
    return Room(sessions, "", NO_LIMITS)


def record(stamp: VersionStamp = STAMP) -> SessionRecord:
    return SessionRecord("lstm", 1, DIGEST, b"", stamp, b"states")


def with_client(url: str, work: Callable[[RedisClient], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        client = RedisClient(url, settings.get("idle_seconds", 60), 60, 2, 0)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


def check(url: str) -> None:
    asyncio.run(check_store(Settings(store=url)))


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://127.0.0.1/abc", "number of a database"),
        ("redis://127.0.0.1/1/2", "number of a database"),
        ("redis://127.0.0.1/0?retries=3", "not valid"),
        ("redis+cluster://127.0.0.1/3", "cluster has no databases"),
        ("redis+sentinel://127.0.0.1", "the name that the Sentinels know"),
        ("redis+sentinel://127.0.0.1/main/abc", "number of a database"),
        ("postgres://127.0.0.1", "redis+cluster"),
        ("redis://:SECRET/x@127.0.0.1/0", "%2F"),
        ("redis://:SECRET#x@127.0.0.1/0", "%23"),
        ("redis://:SECRET?x@127.0.0.1/0", "percent-encode"),
        ("redis://user:top:SECRET", "percent-encode"),
    ],
)
def test_a_wrong_url_is_refused_in_one_line_without_its_password(url: str, told: str) -> None:
    with pytest.raises(StoreUnusable) as refused:
        check(url)
    message = str(refused.value)
    assert told in message
    assert "SECRET" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("prepare", "where", "told"),
    [
        ("", "redis://127.0.0.1:{port}/99", "no database of the number"),
        ("", "redis://someone:wrong@127.0.0.1:{port}/0", "user or the password"),
        ("", "redis+cluster://127.0.0.1:{port}", "redis+cluster://"),
        (f"ACL SETUSER limited on >p ~other:* {COMMANDS}", "redis://limited:p@127.0.0.1:{port}/0", "lacks a command"),
        (f"ACL SETUSER limited on >p ~cellserve:* {COMMANDS} -incr", "redis://limited:p@127.0.0.1:{port}/0", "lacks"),
        ("ACL SETUSER limited on >p ~cellserve:*", "redis://limited:p@127.0.0.1:{port}/0", "lacks a command"),
        ("REPLICAOF 127.0.0.1 1", "redis://127.0.0.1:{port}/0", "name its primary"),
    ],
)
def test_a_store_that_will_not_do_is_reported_as_what_it_is_at_the_start(
    clean: RedisServer, prepare: str, where: str, told: str
) -> None:
    if prepare:
        assert clean.ask(prepare).startswith("+OK")
    with pytest.raises(StoreUnusable, match=told.replace("+", r"\+")):
        check(where.format(port=clean.port))


def test_the_documented_commands_and_keys_suffice_and_the_check_leaves_nothing_of_a_session(clean: RedisServer) -> None:
    assert clean.ask(f"ACL SETUSER limited on >p ~cellserve:* {COMMANDS}").startswith("+OK")
    check(f"redis://limited:p@127.0.0.1:{clean.port}/0")
    assert clean.ask("KEYS *").split()[2::2] in ([], ["cellserve:{cellserve:probe}:next"])


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:1/0", "redis://nobody.invalid/0", "redis+sentinel://127.0.0.1:1/main"]
)
def test_a_store_that_is_away_does_not_end_the_start(url: str) -> None:
    check(url)


def test_a_full_store_does_not_end_the_start_and_its_fault_is_counted(clean: RedisServer) -> None:
    clean.ask("CONFIG SET maxmemory 1")
    check(clean.url)

    async def write(client: RedisClient) -> None:
        with pytest.raises(StoreUnavailable) as refused:
            await client.create("full", record(), room(10))
        assert str(clean.port) not in refused.value.detail
        assert client.errors["out-of-memory"] >= 1

    with_client(clean.url, write)


def test_the_clock_of_one_replica_ends_no_session_and_lets_no_further_one_in(
    clean: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fill(client: RedisClient) -> None:
        for number in range(10):
            assert await client.create(f"s{number}", record(), room(10)) is WriteOutcome.WRITTEN

    async def count(client: RedisClient) -> tuple[Any, ...]:
        return (
            await client.count(),
            await client.create("one more", record(), room(10)),
            len((await client.page("", 0, 100))[0]),
        )

    with_client(clean.url, fill)
    now = time.time
    for jump in (7200.0, -7200.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
        assert with_client(clean.url, count) == ((10, 0), WriteOutcome.FULL, 10)


def test_a_write_sets_deadlines_again_once_less_than_the_idle_time_is_left(clean: RedisServer) -> None:
    names = session, tombstone = scripts.names("a")

    async def work(client: RedisClient) -> None:
        redis, position = client._connection.redis, STAMP.position

        async def deadlines_after_a_step(left: float) -> list[float]:
            nonlocal position
            before, position = position, position + 1
            for name, more in ((session, 0), (tombstone, 60)):
                await redis.pexpire(name, int(1000 * (left + more)))
            old, new = ([VersionStamp(at, STAMP.revision).packed] for at in (before, position))
            assert await client.write(ConditionalWrites(["a"], old, new, [b""], [b""])) == [WriteOutcome.WRITTEN]
            assert await redis.get(tombstone) == b"expired %d" % position
            return [await redis.pttl(name) / 1000 for name in names]

        await client.create("a", record(), room(1))
        assert await deadlines_after_a_step(63) == [pytest.approx(62, abs=1), pytest.approx(122, abs=1)]
        assert await deadlines_after_a_step(59) == [pytest.approx(65, abs=1), pytest.approx(125, abs=1)]
        assert await deadlines_after_a_step(3600) == [pytest.approx(65, abs=1), pytest.approx(125, abs=1)]
        indexed = float(await redis.zscore(scripts.INDEX, "a")) - (await redis.time())[0]
        assert indexed > 66  # so that a session that lives is in the index

    with_client(clean.url, work, idle_seconds=60)


def test_expired_sessions_make_room_and_are_counted_once(clean: RedisServer) -> None:
    async def work(client: RedisClient) -> None:
        for name in ("a", "b"):
            assert await client.create(name, record(), room(2)) is WriteOutcome.WRITTEN
        assert await client.create("a", record(), room(2)) is WriteOutcome.EXISTS
        assert await client.replace("a", record(), room(2)) is WriteOutcome.WRITTEN
        assert await client.create("c", record(), room(2)) is WriteOutcome.FULL
        await asyncio.sleep(1.4)
        assert await client.create("c", record(), room(2)) is WriteOutcome.WRITTEN
        assert await client.count() == (1, 2)
        assert await client.count() == (1, 0)

    with_client(clean.url, work, idle_seconds=1)


def test_a_page_costs_what_its_owner_has_and_a_session_is_on_one_page(clean: RedisServer) -> None:
    async def work(client: RedisClient) -> None:
        for number in range(7):
            for owner in ("alice", "bob"):
                await client.create(f"{owner}/{number}", record(), room(1000))
        theirs = client._touch((f"carol/{number}" for number in range(5000)), "")
        await client._connection.call([theirs], lambda replies: None)
        before = calls()
        found, after, pages = [], 0, 0
        while not pages or after:
            page, after = await client.page("bob", after, 3)
            found += [one.id for one in page if isinstance(one, SessionSummary)]
            pages += 1
        assert found == [str(number) for number in range(7)]
        assert pages <= 4
        assert calls() - before < 30
        assert await client.page("nobody", 0, 3) == ([], 0)

    def calls() -> int:
        """Commands that Redis has processed, those that scripts call left out."""
        (line,) = (line for line in clean.ask("INFO stats").splitlines() if "total_commands_processed" in line)
        return int(line.partition(":")[2])

    with_client(clean.url, work)


def test_more_calls_than_connections_wait_for_one(clean: RedisServer) -> None:
    """Whoever sends many requests while Redis is slow takes it from nobody else."""

    async def work(client: RedisClient) -> None:
        await client.create("sound", record(), room(10))
        clean.process.send_signal(signal.SIGSTOP)
        try:
            calls = [asyncio.create_task(client.load(f"{number}")) for number in range(500)]
            others = asyncio.create_task(client.load("sound"))
            await asyncio.sleep(0.5)
        finally:
            clean.process.send_signal(signal.SIGCONT)
        assert await asyncio.gather(*calls) == [None] * 500
        assert await others is not None
        assert sum(client.errors.values()) == 0
        (line,) = (line for line in clean.ask("INFO clients").splitlines() if "connected_clients" in line)
        assert int(line.partition(":")[2]) < 80

    with_client(clean.url, work)


def test_many_calls_at_once_find_their_scripts_again_after_a_restart(clean: RedisServer) -> None:
    async def work(client: RedisClient) -> None:
        await client.create("sound", record(), room(1000))
        clean.ask("SCRIPT FLUSH")
        clean.process.send_signal(signal.SIGSTOP)
        try:
            calls = [asyncio.create_task(client.create(f"{number}", record(), room(1000))) for number in range(200)]
            await asyncio.sleep(0.5)
        finally:
            clean.process.send_signal(signal.SIGCONT)
        assert await asyncio.gather(*calls) == [WriteOutcome.WRITTEN] * 200
        assert sum(client.errors.values()) == 0

    with_client(clean.url, work)


def test_a_name_that_is_no_text_is_left_out_of_lists(clean: RedisServer) -> None:
    async def work(client: RedisClient) -> None:
        assert await client.create("alice/sound", record(), room(10)) is WriteOutcome.WRITTEN
        index = f"cellserve:{{{scripts.INDEX}}}:of:alice"
        for name in (index, scripts.INDEX):
            clean.ask(f'ZADD {name} 9999999999 "alice/\\xff\\xfe"')
        found, _ = await client.page("alice", 0, 10)
        assert [one.id for one in found if isinstance(one, SessionSummary)] == ["sound"] and len(found) == 1
        reader = RedisReader(clean.url, 5)
        assert [one.key async for one in reader.sessions()] == ["alice/sound"]
        await reader.close()

    with_client(clean.url, work)


ANSWER = bytes(StoredAnswer(bytes(32), 2, 3))
BROKEN = {
    "no position": {"mark": b"three " + STAMP.revision},
    "a negative position": {"mark": b"-3 " + STAMP.revision},
    "a huge position": {"mark": b"9999999999999999999 " + STAMP.revision},
    "a short revision": {"mark": b"3 abc"},
    "no version": {"version": b"one"},
    "a model that no name is": {"model": b"../../etc"},
    "a model that is no text": {"model": b"\xff\xfe"},
    "a digest that is none": {"digest": b"x" * 64},
    "a cut answer": {"last": ANSWER[:-1]},
    "an answer of no kind": {"last": ANSWER[:-1] + b"\x09"},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_record_that_is_not_a_sessions_is_told_apart_and_can_be_ended(clean: RedisServer, what: str) -> None:
    async def work(client: RedisClient) -> None:
        await client.create("broken", record(), room(10))
        await client._connection.redis.hset("cellserve:{broken}:session", mapping=BROKEN[what])
        with pytest.raises(UnreadableRecord):
            await client.load("broken")
        assert await client.end("broken", "deleted") is WriteOutcome.WRITTEN
        assert await client.load("broken") is not None  # a tombstone

    with_client(clean.url, work)


class Impostor:
    """Answers every command but those of the handshake with the same bytes; counts its connections."""

    def __init__(self, answer: bytes) -> None:
        self._answer, self.connections = answer, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0?protocol=2"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while asked := connection.recv(1 << 16):
                commands = re.findall(rb"\*\d+\r\n\$\d+\r\n(\w+)", asked)
                connection.sendall(b"".join(b"+OK\r\n" if one == b"CLIENT" else self._answer for one in commands))


@pytest.mark.parametrize(
    "answer",
    [b":7\r\n", b"$3\r\nyes\r\n", b"*1\r\n$7\r\nwritten\r\n", b"$-1\r\n", b"HTTP/1.1 400 Bad\r\n\r\n", b"*0\r\n"],
)
def test_a_reply_that_does_not_fit_is_the_stores_fault_and_drops_the_connection(answer: bytes) -> None:
    impostor = Impostor(answer)

    async def work(client: RedisClient) -> None:
        write = ConditionalWrites(["one"], [STAMP.packed], [STAMP.packed], [b""], [b""])
        for number in (1, 2):
            with pytest.raises(StoreUnavailable):
                await client.write(write)
            assert client.errors["bad-reply"] == number
        assert impostor.connections == 2
        for call in (
            client.load("one"),
            client.count(),
            client.page("", 0, 10),
            client.create("one", record(), room(10)),
        ):
            with pytest.raises(StoreUnavailable):
                await call

    try:
        with_client(impostor.url, work)
    finally:
        impostor.close()


def test_sessions_are_written_in_one_call_where_redis_takes_their_keys_together(
    clean: RedisServer, tmp_path: Path
) -> None:
    names = [f"s{number}" for number in range(100)]
    stamps = [VersionStamp(3, number.to_bytes(16, "big")).packed for number in range(100)]
    after = [VersionStamp(4, number.to_bytes(16, "big")).packed for number in range(100)]
    answers = [bytes(StoredAnswer(bytes(32), 3, 4)), b""] * 50

    async def work(client: RedisClient) -> None:
        for name, stamp in zip(names, stamps, strict=True):
            if name != "s7":
                assert await client.create(name, record(VersionStamp.unpack(stamp)), room(100)) is WriteOutcome.WRITTEN
        expected = [STAMP.packed if name == "s8" else stamp for name, stamp in zip(names, stamps, strict=True)]
        outcomes = await client.write(ConditionalWrites(names, expected, after, [b"after"] * 100, answers), ["s0"])
        odd = {7: WriteOutcome.GONE, 8: WriteOutcome.CONFLICT}
        assert outcomes == [odd.get(row, WriteOutcome.WRITTEN) for row in range(100)]
        for row in (0, 1, 8, 99):
            found = await client.load(names[row])
            assert isinstance(found, SessionRecord)
            assert found.states == (b"states" if row == 8 else b"after")
            assert (found.last is None) == (row % 2 == 1 or row == 8)

    def calls(server: RedisServer) -> int:
        told = re.search(r"cmdstat_evalsha:calls=([0-9]+)", server.ask("INFO commandstats"))
        return int(told[1]) if told else 0

    clean.ask("CONFIG RESETSTAT")
    with_client(clean.url, work)
    together = calls(clean)
    # A node of a cluster that is not told to be one refuses keys of several slots.
    node = RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        assert node.ask("CLUSTER ADDSLOTSRANGE 0 16383").startswith("+OK")
        until(lambda: "cluster_state:ok" in node.ask("CLUSTER INFO"))
        with_client(node.url, work)
        assert calls(node) > together + 90
    finally:
        node.stop()


def test_a_call_that_fails_midway_is_unavailable_for_all_its_sessions_and_can_be_repeated(
    clean: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = b"    outcomes[place] = 'written'\n"
    fails = scripts.WRITE.replace(written, written + b"    if place == 2 then error('midway') end\n")
    assert fails != scripts.WRITE
    answer, names = StoredAnswer(bytes(32), 3, 4), ["a", "b", "c"]
    stamps = [[VersionStamp(position, bytes(16)).packed] * 3 for position in (3, 4)]
    writes = ConditionalWrites(names, stamps[0], stamps[1], [b"after"] * 3, [bytes(answer)] * 3)

    async def work(client: RedisClient) -> None:
        await client._learn_together()
        for name in names:
            await client.create(name, record(VersionStamp.unpack(stamps[0][0])), room(3))
        with monkeypatch.context() as patched:
            patched.setitem(scripts.SHA1, fails, hashlib.sha1(fails).hexdigest())
            patched.setattr(scripts, "WRITE", fails)
            assert [type(outcome) for outcome in await client.write(writes)] == [StoreUnavailable] * 3
        # What was written has the answer to its repetition, the rest can be written.
        found = [await client.load(name) for name in names]
        assert [isinstance(one, SessionRecord) and one.last for one in found] == [answer, answer, None]
        assert (await client.write(writes))[2] is WriteOutcome.WRITTEN

    with_client(clean.url, work)


def test_a_client_has_room_for_its_own_limits_and_not_for_more(clean: RedisServer) -> None:
    size = len(record().states)

    async def work(client: RedisClient) -> None:
        greedy = Room(100, "10.0.0.7", ClientLimits(2, 1000))
        assert await client.create("a", record(), greedy) is WriteOutcome.WRITTEN
        assert await client.create("b", record(), greedy) is WriteOutcome.WRITTEN
        assert await client.create("c", record(), greedy) is WriteOutcome.CROWDED
        assert await client.replace("c", record(), greedy) is WriteOutcome.CROWDED
        assert await client.replace("b", record(), greedy) is WriteOutcome.WRITTEN
        assert await client.create("d", record(), greedy._replace(client="10.0.0.8")) is WriteOutcome.WRITTEN
        assert await client.longest_idle("10.0.0.8") == "d"
        assert await client.longest_idle("10.0.0.7") == "a"
        assert await client.longest_idle("10.0.0.9") is None
        await client.end("a", "deleted")
        full = greedy._replace(client_limits=ClientLimits(9, 2 * size - 1))
        assert await client.create("c", record(), full) is WriteOutcome.CROWDED
        assert await client.create("e", record(), greedy) is WriteOutcome.WRITTEN
        await asyncio.sleep(2.8)
        assert await client.create("f", record(), greedy) is WriteOutcome.WRITTEN
        assert await client.create("g", record(), greedy) is WriteOutcome.WRITTEN
        for key in ("f", "g"):
            await client.end(key, "deleted")
        assert await client._connection.redis.keys("*by:*") == []
        assert await client._connection.redis.hlen("cellserve:{cellserve:sessions}:clients") == 0
        assert await client._connection.redis.hlen("cellserve:{cellserve:sessions}:bytes") == 0

    with_client(clean.url, work, idle_seconds=2)
