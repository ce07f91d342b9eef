"""A snapshot that is interrupted at any point leaves the old file or the new one, whole."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from cellserve.service.idempotency import AppliedChange, IdempotencyKey
from cellserve.service.sessions.stores.moment import Moment
from cellserve.service.sessions.stores.snapshot import _MAGIC, BadSnapshot, Snapshots
from tests.service.helpers import machinery

# Lets a child write the snapshot and ends it at the first call of anything that is not Python, as a kill would; then
# another one at the second call, and so on, until one comes through. The position of the one session is the attempt's.
PROGRAM = """
import asyncio, json, os, sys, threading
from pathlib import Path
from cellserve.service.sessions.stores.snapshot import Snapshots
from tests.service.helpers import machinery

file = Path(sys.argv[1])

def restored():
    engine, store, _ = machinery()
    snapshots = Snapshots(file, store, lambda: [engine], lambda key, digest: engine)
    assert snapshots.restore() == 1
    snapshots.close()
    session = store.get("", "one")
    return session.position, engine.arena.read(session.slot)["s"].tolist()

def write(attempt):
    calls = 0
    def count(frame, event, argument):
        nonlocal calls
        if event == "c_call":
            calls += 1
            if calls == attempt:
                os._exit(9)
    engine, store, _ = machinery()
    session, _ = store.create_now(engine, {"s": [attempt, attempt]}, session_id="one", position=attempt)
    snapshots = Snapshots(file, store, lambda: [engine], lambda key, digest: engine)
    threading.setprofile(count)  # of the thread that the file is written on
    asyncio.run(snapshots.write())
    os._exit(0)

attempts = []
while not attempts or attempts[-1][0]:
    attempt = len(attempts)  # the first one is let through
    child = os.fork()
    if not child:
        write(attempt)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    attempts.append([status if attempt else 1, *restored()])
print(json.dumps(attempts))
"""


@pytest.mark.parametrize("jump", [7200.0, -7200.0])
def test_a_wall_clock_that_jumps_ends_no_session_and_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    file, now = tmp_path / "sessions", time.time

    def restored(*, again: bool = False) -> list[str]:
        engine, store, _ = machinery()
        snapshots = Snapshots(file, store, lambda: [engine], lambda key, digest: engine if again else None)
        snapshots.restore()
        if not again:  # its model is away meanwhile: it is only kept
            asyncio.run(snapshots.write())
        store.sweep()
        snapshots.close()
        return sorted(store.table.live)

    engine, store, _ = machinery()
    for name, idle in (("fresh", 0), ("old", 50), ("idle", 150)):
        session, _ = store.create_now(engine, session_id=name)
        engine.arena.last_used[session.slot] -= idle
    snapshots = Snapshots(file, store, lambda: [engine], lambda key, digest: engine)
    asyncio.run(snapshots.write())
    snapshots.close()
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    assert restored() == []
    assert restored(again=True) == ["fresh", "old"]


def test_a_moment_of_another_run_of_the_machine_is_as_long_ago_as_the_wall_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Moment.now()
    assert 0 <= before.elapsed() < 60
    assert 50 < Moment(before.wall - 60, "another", before.uptime).elapsed() < 120
    assert Moment(before.wall + 60, "another", 0.0).elapsed() == 0


def test_a_write_that_is_ended_at_any_call_leaves_the_old_snapshot_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "sessions")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    attempts = json.loads(done.stdout)
    written = 0
    for attempt, (status, position, state) in enumerate(attempts):
        assert status in (0, 1, 9)
        assert position in (written, attempt)  # the one before, or this one
        assert state == [position, position]
        written = position
    positions = [position for _, position, _ in attempts]
    # Most ended before the new file had its name, a few after that.
    assert 20 < positions.count(0) < len(attempts) - 1
    assert positions[-1] == len(attempts) - 1


def rewritten(content: bytes, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """A snapshot with something changed in its index or its tensors, and a SHA-256 that fits."""
    tensors = dict(load(content[len(_MAGIC) : -32]))
    index = json.loads(tensors["told"].tobytes())
    change(index, tensors)
    tensors["told"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    content = _MAGIC + save(tensors)
    return content + hashlib.sha256(content).digest()


def first(index: dict[str, Any]) -> list[Any]:
    row: list[Any] = index["models"][0]["sessions"][0]
    return row


@pytest.mark.parametrize(
    "change",
    [
        lambda index, tensors: tensors["0/state.s"].fill(np.nan),
        lambda index, tensors: tensors.update({"0/state.s": np.zeros((1, 3), np.float32)}),
        lambda index, tensors: tensors.update({"0/state.s": np.zeros((1, 2), np.float64)}),
        lambda index, tensors: tensors["0/position"].fill(-1),
        lambda index, tensors: tensors["0/used"].fill(np.inf),
        lambda index, tensors: tensors["0/answers"].view("<f4").fill(np.nan),
        lambda index, tensors: tensors.update({"0/answers": np.zeros(3, np.uint8)}),
        lambda index, tensors: tensors.pop("0/position"),
        lambda index, tensors: tensors.update({"1/more": np.zeros(3, np.uint8)}),
        lambda index, tensors: index["models"].append({**index["models"][0]}),
        lambda index, tensors: index["models"][0].pop("digest"),
        lambda index, tensors: first(index).__setitem__(0, "al/ice"),
        lambda index, tensors: first(index).__setitem__(2, "xyz"),
        lambda index, tensors: first(index)[3].__setitem__(2, 2**70),
        lambda index, tensors: first(index)[3].__setitem__(3, [5, 5]),
        lambda index, tensors: index["gone"].append(["key", "stolen", 3, 1e9]),
        lambda index, tensors: index.update(models=3),
    ],
)
def test_a_snapshot_that_somebody_else_wrote_is_checked_as_input(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]
) -> None:
    file = tmp_path / "sessions"

    def restored() -> int:
        engine, store, _ = machinery()
        snapshots = Snapshots(file, store, lambda: [engine], lambda key, digest: engine)
        try:
            return snapshots.restore()
        finally:
            snapshots.close()

    engine, store, _ = machinery()
    session, _ = store.create_now(engine, {"s": np.ones(2, np.float32)}, session_id="one")
    y = np.ones((1, 2), np.float32)
    session.applied = AppliedChange(IdempotencyKey(0, b"0" * 32), 1, y, None)
    snapshots = Snapshots(file, store, lambda: [engine], lambda key, digest: engine)
    asyncio.run(snapshots.write())
    snapshots.close()
    written = file.read_bytes()
    assert restored() == 1
    file.write_bytes(rewritten(written, lambda index, tensors: None))
    assert restored() == 1
    file.write_bytes(rewritten(written, change))
    with pytest.raises(BadSnapshot):
        restored()


def test_neither_the_snapshot_nor_its_lock_can_be_read_by_others_or_leads_elsewhere(tmp_path: Path) -> None:
    file, victim = tmp_path / "sessions", tmp_path / "victim"
    victim.write_text("whole")
    (tmp_path / "sessions.new").symlink_to(victim)
    engine, store, _ = machinery()
    snapshots = Snapshots(file, store, lambda: [engine], lambda key, digest: engine)
    asyncio.run(snapshots.write())
    snapshots.close()
    assert victim.read_text() == "whole"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (file, tmp_path / "sessions.lock")} == {0o600}
    (tmp_path / "sessions.lock").unlink()
    (tmp_path / "sessions.lock").symlink_to(victim)
    with pytest.raises(BadSnapshot):
        Snapshots(file, store, lambda: [engine], lambda key, digest: engine)
    assert victim.read_text() == "whole"
