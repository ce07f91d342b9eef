"""A record of LMDB that cannot be read is the matter of its session alone."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from cellserve.service.sessions.session import SessionSummary
from cellserve.service.sessions.stores.lmdb.folder import Folder
from cellserve.service.sessions.stores.lmdb.header import to_key
from cellserve.service.sessions.stores.lmdb.store_client import LmdbClient
from cellserve.service.sessions.stores.records import TombstoneRecord, UnreadableRecord, WriteOutcome
from tests.service.test_lmdb import MAP, ROOM, changes, record

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda record: b"",
    "a byte": lambda record: b"x",
    "cut in its header": lambda record: record[:40],
    "cut in its states": lambda record: record[:100],
    "a position that is none": lambda record: b"\xff" * 8 + record[8:],
    "a time that is none": lambda record: record[:44] + b"\xff" * 8 + record[52:],
    "a model that is not there": lambda record: record[:52] + b"\x09" + record[53:],
}


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def damage(client: LmdbClient, name: str, how: Callable[[bytes], bytes]) -> None:
    records = client._shards[0]
    key, sessions = to_key(name), records._sessions
    records.environment.run(
        lambda transaction: transaction.put(key, how(bytes(transaction.get(key, b"", db=sessions))), db=sessions)
    )


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_record_is_one_sessions_error(tmp_path: Path, what: str) -> None:
    async def live() -> None:
        clock = Clock()
        client = LmdbClient(Folder(tmp_path / "store", MAP, False, 1000), 3600, 3600, MAP, clock)
        names, before = ["deleted", "left", "sound"], [record(1), record(2), record(3)]
        for name, one in zip(names, before, strict=True):
            assert await client.create(name, one, ROOM) is WriteOutcome.WRITTEN
        damage(client, "deleted", DAMAGES[what])
        writes = changes(["deleted", "sound"], [before[0].stamp, before[2].stamp], [record(2), record(4)])
        assert client.write_now(writes)[1] is WriteOutcome.WRITTEN
        for name in names[:2]:
            damage(client, name, DAMAGES[what])
            with pytest.raises(UnreadableRecord):
                await client.load(name)
            assert await client.create(name, record(0), ROOM) is WriteOutcome.EXISTS
        assert client.stamps(names)[2] == writes.stamps[1]
        *unreadable, sound = (await client.page("", 0, 10))[0]
        assert [type(one) for one in unreadable] == [UnreadableRecord] * 2
        assert isinstance(sound, SessionSummary)
        assert await client.longest_idle(ROOM.client) in names
        assert await client.end("deleted", "deleted") is WriteOutcome.WRITTEN
        found = await client.load("deleted")
        assert isinstance(found, TombstoneRecord)
        assert found.reason == "deleted"
        clock.now += 5000
        client.keep_house()
        assert await client.load("sound") == TombstoneRecord("expired", 4)
        assert await client.replace("left", record(0), ROOM) is WriteOutcome.WRITTEN
        assert await client.count() == (1, 2 if what == "a model that is not there" else 1)
        await client.close()

    asyncio.run(live())


def test_what_is_no_entry_of_an_index_or_no_key_harms_no_session(tmp_path: Path) -> None:
    async def live() -> None:
        clock = Clock()
        client = LmdbClient(Folder(tmp_path / "store", MAP, False, 1000), 3600, 3600, MAP, clock)
        sound = record(1)
        assert await client.create("sound", sound, ROOM) is WriteOutcome.WRITTEN
        records = client._shards[0]
        clients = records._clients
        whole = records.environment.run(
            lambda transaction: bytes(transaction.get(b"/sound", b"", db=records._sessions))
        )
        junk = [(records._sessions, key, whole) for key in (b"/\xff", b"\xff\xff", b"/" + b"k" * 400)]
        junk += [(index, key, b"") for index in (records._deadlines, records._forgetting) for key in (b"\0", bytes(8))]
        junk += [(records._deadlines, struct.pack(">d", 1.0) + b"/\xff", b"")]
        tombstones = {
            "cut": b"x",
            "unknown": struct.pack("<dQB", 1e12, 5, 200),
            "far": struct.pack("<dQB", 1e12, 1 << 63, 0),
        }
        junk += [(records._tombstones, to_key(name), value) for name, value in tombstones.items()]
        junk += [(clients._totals, b"/" + ROOM.client.encode(), b"x")]
        records.environment.run(lambda transaction: [transaction.put(key, value, db=db) for db, key, value in junk])
        assert await client.load("sound") == sound
        found, _ = await client.page("", 0, 10)
        assert [type(one) for one in found] == [SessionSummary, SessionSummary, UnreadableRecord]
        for name in tombstones:
            assert await client.load(name) is None
            assert await client.create(name, record(2), ROOM) is WriteOutcome.WRITTEN
        for key in {await client.longest_idle(), await client.longest_idle(ROOM.client)}:
            assert key is not None and await client.end(key, "evicted") is WriteOutcome.WRITTEN
        clock.now += 5000
        client.keep_house()
        assert await client.load("far") == TombstoneRecord("expired", 2)
        await client.close()

    asyncio.run(live())
