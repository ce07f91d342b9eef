"""The LMDB store's folder: power cuts at any write, a full map, locks, formats, and a worker that is stopped."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Semaphore

import pytest

from cellserve.service.errors import StoreUnavailable
from cellserve.service.sessions.session import NO_LIMITS, Room, SessionSummary
from cellserve.service.sessions.stores.lmdb import folder as folder_module
from cellserve.service.sessions.stores.lmdb.checkpoint import Checkpoint
from cellserve.service.sessions.stores.lmdb.environment import Environment
from cellserve.service.sessions.stores.lmdb.folder import Folder
from cellserve.service.sessions.stores.lmdb.store_client import LmdbClient
from cellserve.service.sessions.stores.lmdb.watchdog import Watch, Watchdog
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.sessions.stores.records import (
    ConditionalWrites,
    SessionRecord,
    VersionStamp,
    WriteOutcome,
    new_revision,
)

SECTOR = 512
MAP = 2**26
ROOM = Room(10**6, "someone", NO_LIMITS)


def opened(path: Path, sync: bool = False, checkpoint_seconds: float = 1000, max_bytes: int = MAP) -> LmdbClient:
    return LmdbClient(Folder(path, max_bytes, sync, checkpoint_seconds), 3600, 3600, max_bytes)


def record(position: int, size: int = 900) -> SessionRecord:
    """A session whose state says its position."""
    stamp = VersionStamp(position, new_revision())
    states = position.to_bytes(8, "big") * (size // 8)
    return SessionRecord("rnn", 1, "0" * 64, b"", stamp, states, created_at=1.5)


def changes(names: list[str], before: list[VersionStamp], after: list[SessionRecord]) -> ConditionalWrites:
    stamps = [one.packed for one in before], [one.stamp.packed for one in after]
    return ConditionalWrites(names, *stamps, [one.states for one in after], [b""] * len(names))


class Sessions:
    """Sessions that are created, stepped and deleted at random, and what they should be after each transaction."""

    def __init__(self, client: LmdbClient, rng: random.Random, large: bool = False) -> None:
        self.client, self.rng = client, rng
        self.size = 9000 if large else 900
        self.known: dict[str, SessionRecord] = {}
        self.number = 0

    async def change(self) -> dict[str, SessionRecord]:
        for _ in range(self.rng.randrange(4)):
            name = f"s{self.number}"
            self.number += 1
            self.known[name] = record(0, self.size)
            assert await self.client.create(name, self.known[name], ROOM) is WriteOutcome.WRITTEN
        if len(self.known) > 20:
            name = self.rng.choice(list(self.known))
            del self.known[name]
            assert await self.client.end(name, "deleted") is WriteOutcome.WRITTEN
        names = self.rng.sample(sorted(self.known), min(len(self.known), 8))
        after = [replace(record(self.known[name].stamp.position + 1, self.size)) for name in names]
        writes = changes(names, [self.known[name].stamp for name in names], after)
        assert set(await self.client.write(writes)) <= {WriteOutcome.WRITTEN}
        self.known |= dict(zip(names, after, strict=True))
        return dict(self.known)


async def read(client: LmdbClient) -> dict[str, SessionRecord]:
    """Everything in a store, found both by its pages and by its names."""
    found: dict[str, SessionRecord] = {}
    cursor = 0
    while True:
        page, cursor = await client.page("", cursor, 7)
        for listed in page:
            assert isinstance(listed, SessionSummary)
            name, position = listed.id, listed.position
            one = await client.load(name)
            assert isinstance(one, SessionRecord)
            assert one.stamp.position == position == int.from_bytes(one.states[:8], "big")
            found[name] = one
        if not cursor:
            return found


@pytest.fixture
def another_boot(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The machine's id, which a test changes as a power cut would."""
    boot = ["first"]
    for module in ("checkpoint", "environment"):
        monkeypatch.setattr(f"cellserve.service.sessions.stores.lmdb.{module}.boot_id", lambda: boot[0])
    yield boot


def mixed(versions: list[bytes], rng: random.Random) -> bytes:
    """A file each of whose sectors is as it was at any of these moments: the system writes them in any order."""
    size = rng.choice([len(one) for one in versions])
    out = bytearray(versions[0].ljust(size, b"\0")[:size] if len(versions[0]) < size else versions[0])
    newest = rng.random()  # how much of the newest has arrived
    for start in range(0, len(out), SECTOR):
        version = versions[-1] if rng.random() < newest else rng.choice(versions)
        part = version[start : start + SECTOR]
        if len(part) == SECTOR:
            out[start : start + SECTOR] = part
    return bytes(out)


@pytest.mark.parametrize("seed", range(6))
def test_after_a_power_cut_at_any_write_the_store_is_as_of_its_last_checkpoint(
    tmp_path: Path, another_boot: list[str], seed: int
) -> None:
    rng = random.Random(seed)
    path = tmp_path / "store"
    data, told = path / "0" / "data.mdb", path / "0" / "checkpoint"

    async def serve() -> list[tuple[bytes, bytes, dict[str, SessionRecord]]]:
        """Gives what may be on disk after cuts: the file, the checkpoint and what it should lead to."""
        client = opened(path)
        sessions = Sessions(client, rng, large=seed % 2 == 1)
        cuts = []
        for _ in range(3):
            for _ in range(rng.randrange(1, 8)):
                await sessions.change()
            before = dict(sessions.known)
            client.folder.shards[0].checkpoint()
            versions = [data.read_bytes()]
            for _ in range(12):
                await sessions.change()
                versions.append(data.read_bytes())
            cuts += [(mixed(versions, rng), told.read_bytes(), before) for _ in range(5)]
        await client.close()
        return cuts

    async def check(content: bytes, checkpoint: bytes, expected: dict[str, SessionRecord]) -> None:
        data.write_bytes(content)
        told.write_bytes(checkpoint)
        client = opened(path)
        assert await read(client) == expected
        assert (await client.count())[0] == len(expected)
        again = Sessions(client, rng)  # and it goes on from there
        again.known, again.number = dict(expected), 10_000
        for _ in range(5):
            await again.change()
        assert await read(client) == again.known
        await client.close()

    cuts = asyncio.run(serve())
    for cut in cuts:
        another_boot[0] = f"after {rng.random()}"
        asyncio.run(check(*cut))


def test_without_its_checkpoint_a_store_is_not_whole_after_a_power_cut(tmp_path: Path, another_boot: list[str]) -> None:
    """The harness can fail: LMDB alone, with commits that are not synced, does not stand what it does."""
    rng = random.Random(1)
    path = tmp_path / "store"

    async def serve() -> tuple[list[bytes], dict[str, SessionRecord]]:
        client = opened(path)
        sessions = Sessions(client, rng)
        versions = []
        for _ in range(20):
            await sessions.change()
            versions.append((path / "0" / "data.mdb").read_bytes())
        await client.close()
        return versions, sessions.known

    versions, _ = asyncio.run(serve())
    program = (
        "import asyncio, sys; from pathlib import Path; from tests.service.test_lmdb import opened, read\n"
        "asyncio.run(read(opened(Path(sys.argv[1]))))"
    )

    def is_whole(number: int) -> bool:
        cut = tmp_path / str(number)
        shutil.copytree(path, cut)
        (cut / "0" / "checkpoint").unlink()
        (cut / "0" / "data.mdb").write_bytes(mixed(versions[10:], rng))
        return subprocess.run([sys.executable, "-c", program, str(cut)], capture_output=True).returncode == 0

    assert not all(map(is_whole, range(4)))  # a broken one is enough


def test_with_a_sync_per_commit_a_power_cut_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """LMDB syncs all pages before it writes the root: until then any of them may have arrived."""
    rng = random.Random(3)
    path = tmp_path / "store"
    data = path / "0" / "data.mdb"
    page = 4096

    async def serve() -> list[tuple[bytes, dict[str, SessionRecord]]]:
        client = opened(path, sync=True)
        sessions, cuts = Sessions(client, rng), []
        for _ in range(10):
            await sessions.change()
        for _ in range(8):
            before, expected = data.read_bytes(), dict(sessions.known)
            name = sorted(sessions.known)[0]
            new = record(sessions.known[name].stamp.position + 1)
            await client.write(changes([name], [sessions.known[name].stamp], [new]))
            sessions.known[name] = new
            after = mixed([before, data.read_bytes()], rng)
            cuts.append((before[: 2 * page] + after[2 * page :], expected))
        await client.close()
        return cuts

    async def check(content: bytes, expected: dict[str, SessionRecord]) -> None:
        data.write_bytes(content)
        client = opened(path, sync=True)
        assert await read(client) == expected
        await client.close()

    for cut in asyncio.run(serve()):
        asyncio.run(check(*cut))


def test_a_clean_stop_or_a_kill_alone_goes_back_to_nothing(tmp_path: Path, another_boot: list[str]) -> None:
    async def serve(close: bool) -> None:
        client = opened(tmp_path)
        assert await client.create(f"close {close}", record(7), ROOM) is WriteOutcome.WRITTEN
        if close:
            await client.close()
        else:
            os._exit(0)

    if not (child := os.fork()):
        asyncio.run(serve(False))
    os.waitpid(child, 0)
    asyncio.run(serve(True))  # the same run of the machine
    another_boot[0] = "second"

    async def check() -> None:
        client = opened(tmp_path)
        assert sorted(await read(client)) == ["close False", "close True"]
        await client.close()

    asyncio.run(check())


def test_without_checkpoints_a_store_is_refused_after_a_power_cut(tmp_path: Path, another_boot: list[str]) -> None:
    if not (child := os.fork()):
        store = opened(tmp_path, checkpoint_seconds=0)
        os._exit(store is None)
    os.waitpid(child, 0)
    another_boot[0] = "second"
    with pytest.raises(StoreUnusable, match=r"went down .* restore a backup"):
        opened(tmp_path)


def test_a_full_store_keeps_what_it_has_and_takes_more_when_there_is_room(tmp_path: Path) -> None:
    async def work() -> None:
        client = opened(tmp_path, checkpoint_seconds=0, max_bytes=2**22)
        count = 0
        with pytest.raises(Exception, match="--store-max-bytes"):
            while True:
                await client.create(f"s{count}", record(0), ROOM)
                count += 1
        known = await read(client)
        stamps = [known[f"s{number}"].stamp for number in range(count)]
        new = record(1)
        # There is room for steps of the sessions that there are.
        writes = changes([f"s{number}" for number in range(5)], stamps[:5], [new] * 5)
        assert await client.write(writes) == [WriteOutcome.WRITTEN] * 5
        huge = replace(record(2), states=b"0" * 2**22)
        outcomes = client.write_now(changes(["s0"], [new.stamp], [huge]))
        assert isinstance(outcomes[0], StoreUnavailable)
        assert client.errors["full"] == 1
        found = await client.load("s0")
        assert isinstance(found, SessionRecord) and found.stamp == new.stamp
        for number in range(count // 2):
            await client.end(f"s{number}", "deleted")
        assert await client.create("new", record(0), ROOM) is WriteOutcome.WRITTEN
        await client.close()

    asyncio.run(work())


def test_a_file_that_grows_gets_checkpoints_early_so_that_its_pages_are_used_again(tmp_path: Path) -> None:
    async def work() -> None:
        client, size, rows = opened(tmp_path, max_bytes=2**30), 64 * 1024, 16
        names, sessions = [f"s{number}" for number in range(rows)], [record(0, size)] * rows
        for name, one in zip(names, sessions, strict=True):
            await client.create(name, one, ROOM)
        first = Checkpoint.load(tmp_path / "0")
        for position in range(1, 321):  # 320 MiB
            after = [record(position, size)] * rows
            client.write_now(changes(names, [one.stamp for one in sessions], after))
            sessions = after
            await asyncio.wrap_future(client.folder.shards[0]._submitted)  # however slow the disk is
        last = Checkpoint.load(tmp_path / "0")
        assert first is not None and last is not None and last.at > first.at
        assert client.folder.shards[0].bytes_used < 160 * 2**20
        assert {one.stamp for one in (await read(client)).values()} == {sessions[0].stamp}
        await client.close()

    asyncio.run(work())


def test_deleted_sessions_make_room_for_others(tmp_path: Path) -> None:
    async def work() -> None:
        client = opened(tmp_path, checkpoint_seconds=0)
        sizes = []
        for turn in range(6):
            for number in range(50):
                await client.create(f"{turn}-{number}", record(0, 100_000), ROOM)
            for number in range(50):
                await client.end(f"{turn}-{number}", "deleted")
            sizes.append(client.folder.shards[0].bytes_used)
        assert sizes[-1] < 1.3 * sizes[1]
        await client.close()

    asyncio.run(work())


def test_one_server_uses_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.service.test_lmdb import opened\n"
        "store = opened(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == b"open\n"
    try:
        with pytest.raises(StoreUnusable, match="another server uses"):
            opened(tmp_path)
    finally:
        other.kill()
        other.communicate()
    asyncio.run(opened(tmp_path).close())


def test_folders_that_cannot_be_used_are_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "newer", "unknown", "broken", "none", "foreign", "file"
    newer, unknown, broken, none, foreign, file = (tmp_path / name for name in names)
    for folder in (newer, unknown, broken, none, foreign):
        folder.mkdir()
    (newer / "store.json").write_text(json.dumps({"format": 99, "shards": 1}))
    (unknown / "store.json").write_text(json.dumps({"format": 0, "shards": 1}))
    (broken / "store.json").write_text("{")
    (none / "store.json").write_text(json.dumps({"format": 2, "shards": 0}))
    (foreign / "0").mkdir()
    (foreign / "0" / "data.mdb").write_bytes(b"something else" * 1000)
    file.write_text("")
    reasons = {
        newer: "format 99, of a newer",
        unknown: "format 0, which this Cellserve does not read",
        broken: "is damaged",
        none: "is damaged",
        foreign: "cannot be used",
        file: "cannot be used",
    }
    for folder, reason in reasons.items():
        with pytest.raises(StoreUnusable, match=reason):
            opened(folder)
    monkeypatch.setattr(folder_module, "_NETWORK", ("",))  # every file system counts as one of these
    monkeypatch.setattr(folder_module, "_LOCAL", ())
    with pytest.raises(StoreUnusable, match=r"network file system .* local disk"):
        opened(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["store.json", "0/data.mdb", "0/checkpoint", "server.lock"])
@pytest.mark.parametrize("what", ["a pipe", "a device", "a link"])
def test_a_store_is_not_read_or_written_through_what_is_no_file(tmp_path: Path, name: str, what: str) -> None:
    folder, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    asyncio.run(opened(folder).close())
    file = folder / name
    file.unlink()
    if what == "a pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if what == "a device" else elsewhere)
    with pytest.raises(StoreUnusable, match="cannot be used"):
        opened(folder)
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("nfs4", True), ("cifs", True), ("smb3", True), ("9p", True), ("ceph", True), ("fuse.sshfs", True),
     ("fuse.glusterfs", True), ("fuse", True), ("fuse.gcsfuse", True), ("ext4", False), ("xfs", False),
     ("overlay", False), ("tmpfs", False), ("fuseblk", False), ("fuse.fuse-overlayfs", False)],
)  # fmt: skip
def test_network_file_systems_are_recognised_by_their_type(kind: str, refused: bool) -> None:
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"36 22 0:52 / /mnt/cells rw,relatime shared:2 master:1 - {kind} server:/export rw,vers=4\n"
    )
    assert folder_module.network_kind(mounts, "0:52") == (kind if refused else None)
    assert folder_module.network_kind(mounts, "8:1") is None


def test_an_older_format_is_migrated_step_by_step_and_again_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def write() -> None:
        client = opened(tmp_path)
        await client.create("kept", record(7), ROOM)
        await client.close()

    async def positions() -> dict[str, int]:
        client = opened(tmp_path)
        found = {name: one.stamp.position for name, one in (await read(client)).items()}
        await client.close()
        return found

    def crashes(path: Path) -> None:
        ran.append("crash")
        raise OSError("no power")

    asyncio.run(write())
    ran: list[str] = []
    first = folder_module._FORMAT
    monkeypatch.setattr(folder_module, "_FORMAT", first + 2)
    migrations = {first: lambda path: ran.append(f"first of {path.name}"), first + 1: crashes}
    monkeypatch.setattr(folder_module, "_MIGRATIONS", migrations)
    with pytest.raises(StoreUnusable, match="no power"):
        opened(tmp_path)
    migrations[first + 1] = lambda path: ran.append("second")
    for _ in range(2):
        assert asyncio.run(positions()) == {"kept": 7}
    assert ran == [f"first of {tmp_path.name}", "crash", "second"]
    assert json.loads((tmp_path / "store.json").read_text())["format"] == first + 2


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    Checkpoint("x", 0, False, "").save(tmp_path)
    (tmp_path / "checkpoint").write_bytes((tmp_path / "checkpoint").read_bytes()[:-3])
    with pytest.raises(StoreUnusable, match="damaged: restore"):
        Checkpoint.load(tmp_path)


def test_a_write_is_watched_until_its_end_whatever_another_thread_writes(tmp_path: Path) -> None:
    cells, entered, ended, seen = memoryview(bytearray(4 * 8)).cast("I"), Semaphore(0), Event(), []

    class Seen(Watch):
        def __enter__(self) -> None:
            super().__enter__()
            entered.release()

    class Watches(Watchdog):
        def __init__(self) -> None:
            self.free = iter(range(8))

        def watch(self) -> Watch:
            place = next(self.free)
            return Seen(cells[place : place + 1])

    async def large_and_small() -> None:
        environment = Environment(tmp_path / "store", MAP, False, 0, Watches())
        large = asyncio.ensure_future(environment.write(lambda _: ended.wait(), large=True))
        await asyncio.to_thread(entered.acquire)
        small = asyncio.ensure_future(asyncio.to_thread(environment.run, lambda _: seen.append(any(cells))))
        await asyncio.to_thread(entered.acquire)
        ended.set()
        await asyncio.gather(large, small)
        await environment.close(last=False)

    asyncio.run(large_and_small())
    assert (seen, any(cells)) == ([True], False)


WORKERS = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from cellserve.service.sessions.stores.lmdb.folder import Folder
from tests.service.test_lmdb import MAP, ROOM, record
from cellserve.service.sessions.stores.lmdb.store_client import LmdbClient

def client():
    return LmdbClient(Folder(Path(sys.argv[1]), MAP, False, 1000, workers=2), 3600, 3600, MAP)

def hang(how, holding):
    def job(transaction):
        holding.set()
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    client().folder.shards[0].run(job)

def work(holding, done):
    import asyncio
    mine = client()
    holding.wait()
    start = time.monotonic()
    asyncio.run(mine.create("after", record(3), ROOM))
    done.put(time.monotonic() - start)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    import asyncio
    parent = Folder(Path(sys.argv[1]), MAP, False, 1000, workers=2)
    asyncio.run(parent.leave_to_workers())
    holding, done = context.Event(), context.Queue()
    one = context.Process(target=hang, args=(sys.argv[2], holding), daemon=True)
    other = context.Process(target=work, args=(holding, done), daemon=True)
    other.start()
    one.start()
    print(done.get(timeout=200))
    one.join(10)
    print(one.exitcode)
"""


@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.long), "killed"])
def test_a_worker_that_ends_in_the_middle_of_a_write_blocks_the_others_for_seconds_only(
    tmp_path: Path, how: str
) -> None:
    program = tmp_path / "workers.py"
    program.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "store"), how],
        capture_output=True,
        text=True,
        timeout=240,  # on a busy machine its imports alone take a minute
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    waited, status = done.stdout.split()
    assert float(waited) < 10
    assert int(status) == -signal.SIGKILL


@pytest.mark.parametrize("sync", [False, True])
def test_a_request_that_outlives_the_stop_is_told_that_the_store_is_away(tmp_path: Path, sync: bool) -> None:
    async def scenario() -> None:
        client = opened(tmp_path / "store", sync)
        before, after = record(0), record(1)
        await client.create("one", before, ROOM)
        await client.close()
        (outcome,) = await client.write(changes(["one"], [before.stamp], [after]))
        assert isinstance(outcome, StoreUnavailable)
        for ask in (
            lambda: client.find("one"),
            lambda: client.stamp("one"),
            lambda: client.create("two", before, ROOM),
            lambda: client.end("one", "deleted"),
            lambda: client.page("", 0, 10),
            lambda: client.longest_idle(),
        ):
            with pytest.raises(StoreUnavailable):
                asked = ask()
                if inspect.isawaitable(asked):
                    await asked

    asyncio.run(asyncio.wait_for(scenario(), 10))
