"""What is measured of the stores of sessions: without HTTP, at a restart, and the disk itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.rounds import Figure
from bench.servers import ROOT


def syncs(folder: Path, seconds: float) -> Figure:
    """Returns how often a second the disk syncs a block that is appended to a file."""
    with (folder / "syncs").open("wb", buffering=0) as file:
        count, start = 0, time.perf_counter()
        while (taken := time.perf_counter() - start) < seconds:
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            count += 1
    return Figure(count / taken)


def ticks(folder: Path, store: str, processes: int) -> Callable[[float], Figure]:
    """Returns a run of processes that step sessions without HTTP.

    Args:
        folder: Holds the models, and the folder of the store.
        store: `memory`, or `lmdb`: a new folder for each run.
        processes: How many.
    """

    def run(seconds: float) -> Figure:
        own = folder / "ticks"
        shutil.rmtree(own, ignore_errors=True)
        where = "memory" if store == "memory" else f"lmdb:{own}"
        result = _run(str(folder / "artifacts"), where, str(processes), str(seconds))
        return Figure(**json.loads(result.splitlines()[-1]))

    return run


def fill(folder: Path, sessions: int) -> str:
    """Makes a store with so many sessions of 1 KB; returns it as `--store` takes it."""
    store = f"lmdb:{folder / 'many'}"
    _run(str(folder / "artifacts"), store, "fill", str(sessions))
    return store


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.peers.ticks", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, range(os.cpu_count() or 1)),  # not on the load's core alone
    )
    if done.returncode:
        raise RuntimeError(f"measuring a store failed: {done.stderr[-2000:]}")
    return done.stdout
