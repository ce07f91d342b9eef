"""A snapshot that is interrupted at any point leaves the old file or the new one, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
