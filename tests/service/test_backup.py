"""A backup of the LMDB store: every shard as at one moment, a clock that stands still, and whole or refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cellserve.service.sessions.session import NO_LIMITS, Room
from cellserve.service.sessions.stores.lmdb.backup import back_up
from cellserve.service.sessions.stores.lmdb.checkpoint import Checkpoint
from cellserve.service.sessions.stores.lmdb.folder import Folder
from cellserve.service.sessions.stores.lmdb.reader import FolderReader
from cellserve.service.sessions.stores.lmdb.store_client import LmdbClient
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.sessions.stores.records import SessionRecord, VersionStamp, WriteOutcome, new_revision

MAP = 2**30
ROOM = Room(10**6, "alice", NO_LIMITS)
PAIR = "alice/a", "alice/d"  # in different shards, of two

# Moves two sessions in turn, so that the second is never ahead, and never more than one behind.
WRITER = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from tests.service.test_backup import PAIR, opened, record
from cellserve.service.sessions.stores.records import ConditionalWrites

async def work():
    client = opened(Path(sys.argv[1]))
    now = {name: (await client.load(name)).stamp for name in PAIR}
    print("ready", flush=True)
    while True:
        for name in PAIR:
            new = record(now[name].position + 1).stamp
            await client.write(ConditionalWrites([name], [now[name].packed], [new.packed], [b"state"], [b""]))
            now[name] = new

asyncio.run(work())
"""


def opened(path: Path, workers: int = 2) -> LmdbClient:
    return LmdbClient(Folder(path, MAP, False, 1000, workers), 3600, 3600, MAP)


def record(position: int) -> SessionRecord:
    return SessionRecord("rnn", 1, "0" * 64, b"", VersionStamp(position, new_revision()), b"state")


def create(path: Path, *names: str) -> None:
    """Makes a store with sessions in a folder."""

    async def work() -> None:
        client = opened(path)
        for name in names:
            assert await client.create(name, record(7), ROOM) is WriteOutcome.WRITTEN
        await client.close()

    asyncio.run(work())


def listed(path: Path) -> dict[str, int]:
    with closing(FolderReader(path)) as reader:
        return {one.key: one.position for one in reader.sessions()}


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    """A store of two shards, to which another process commits all the time."""
    folder = tmp_path / "store"
    create(folder, *PAIR)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
    assert writer.stdout and writer.stdout.readline() == b"ready\n"
    yield folder
    writer.kill()
    writer.communicate()


def test_all_shards_of_a_backup_are_as_at_one_moment(busy: Path, tmp_path: Path) -> None:
    with closing(FolderReader(busy)) as reader:
        moments: set[tuple[int, ...]] = set()
        until = time.monotonic() + 60
        while len(moments) < 60 and time.monotonic() < until:
            with ExitStack() as stack:
                transactions, one_moment = reader.begin_together(stack)
                assert one_moment
                moments.add(tuple(one.id() for one in transactions))
    assert len(moments) == 60  # the other process went on
    apart = [first - second for first, second in moments]
    assert max(apart) - min(apart) <= 1
    for number in range(3):
        copied = back_up(busy, tmp_path / str(number))
        assert (copied.sessions, copied.shards, copied.one_moment) == (2, 2, True)
        ahead, behind = (listed(tmp_path / str(number))[name] for name in PAIR)
        assert behind <= ahead <= behind + 1


def test_the_clock_of_a_backup_stands_still_until_a_server_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, backup, again = (tmp_path / name for name in ("store", "backup", "again"))
    create(store, *PAIR)
    back_up(store, backup)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 100_000)
    assert listed(store) == {}  # they have expired
    assert listed(backup).keys() == set(PAIR)
    back_up(backup, again)
    for folder in (backup, again):
        client = opened(folder)
        assert asyncio.run(client.load(PAIR[0])) is not None
        assert asyncio.run(client.create("new", record(0), ROOM)) is WriteOutcome.WRITTEN
        client.keep_house()
        asyncio.run(client.close())
        assert listed(folder).keys() == {*PAIR, "new"}
        assert json.loads((folder / "store.json").read_bytes())["stopped"] is None
    monkeypatch.setattr(time, "time", lambda: real() + 103_000)
    assert listed(again).keys() == {*PAIR, "new"}
    monkeypatch.setattr(time, "time", lambda: real() + 106_000)
    assert listed(again) == {}  # it has gone on since


def test_a_store_of_many_sessions_is_listed_whole(tmp_path: Path) -> None:
    names = {f"alice/{number}" for number in range(1100)} | {f"{number}" for number in range(1100)}
    create(tmp_path / "store", *sorted(names))
    assert listed(tmp_path / "store") == dict.fromkeys(names, 7)


def test_a_target_that_is_not_empty_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    store, full, file = (tmp_path / name for name in ("store", "full", "file"))
    create(store, *PAIR)
    full.mkdir()
    (full / "mine").write_text("whole")
    file.write_text("whole")
    for target in (full, file, store):
        with pytest.raises(StoreUnusable, match=r"is not empty|Not a directory"):
            back_up(store, target)
    assert (full / "mine").read_text() == file.read_text() == "whole"
    with pytest.raises(StoreUnusable, match="could not be copied to /proc/x"):
        back_up(store, Path("/proc/x"))
    empty = tmp_path / "empty"
    (empty / "lost+found").mkdir(parents=True)
    back_up(store, empty)
    assert listed(empty).keys() == set(PAIR)


def test_a_copy_that_failed_leaves_nothing_and_one_that_was_interrupted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, backup = tmp_path / "store", tmp_path / "backup"
    create(store, *PAIR)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("cellserve.service.sessions.stores.lmdb.backup.sync_folder", fail)
        with pytest.raises(StoreUnusable, match="No space left"):
            back_up(store, backup)
    assert list(backup.iterdir()) == []
    back_up(store, backup)
    (backup / "store.json").unlink()  # is written last
    with pytest.raises(StoreUnusable, match="no store of sessions"):
        listed(backup)
    with pytest.raises(StoreUnusable, match="a copy that was interrupted"):
        opened(backup)


def test_folders_that_cannot_be_read_as_they_are_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, newer, older, foreign = (tmp_path / name for name in ("store", "newer", "older", "foreign"))
    create(store, *PAIR)
    for folder, number in ((newer, 99), (older, 1), (foreign, 2)):
        (folder / "0").mkdir(parents=True)
        (folder / "store.json").write_text(json.dumps({"format": number, "shards": 1}))
    for folder, reason in (
        (newer, "of a newer Cellserve"),
        (older, "format 1, which this Cellserve does not read"),
        (foreign, "cannot be read"),
        (tmp_path, "no store of"),
    ):
        with pytest.raises(StoreUnusable, match=reason):
            FolderReader(folder)
    found = Checkpoint.load(store / "0")
    assert found is not None
    Checkpoint("another boot", found.at, False, found.root).save(store / "0")
    with pytest.raises(StoreUnusable, match="start a server on it first"):
        FolderReader(store)


def test_a_damaged_file_is_reported_and_ends_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    create(folder, *(f"alice/{number}" for number in range(300)))
    data = folder / "0" / "data.mdb"
    whole = data.read_bytes()
    data.write_bytes(whole[:12288])
    for use in (listed, opened):
        with pytest.raises(StoreUnusable, match=r"data\.mdb is cut off: restore a backup"):
            use(folder)
    data.write_bytes(whole[:8192] + b"\xa5" * (len(whole) - 8192))
    with pytest.raises(StoreUnusable, match=r"is damaged|cannot be read|no store of sessions"):
        listed(folder)
