"""Engine and store without HTTP: processes that each step 256 sessions of 1 KB in ticks of all of them.

usage: python -m bench.peers.ticks MODELS STORE PROCESSES SECONDS    prints steps per second, and CPU µs a step
       python -m bench.peers.ticks MODELS lmdb:FOLDER fill SESSIONS  makes a store with so many sessions

STORE is as `--store` takes it. Each process has a core of its own, if there are enough; over one folder they are the
workers of one server.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SESSIONS, FEATURES = 256, 16
WARM_SECONDS = 0.3
BATCH = 5000  # sessions in a transaction, when a store is filled


def context(models: str, store: str, workers: int) -> Any:
    from cellserve.service.context import ServiceContext
    from cellserve.service.settings import Settings

    most = 10_000_000
    return ServiceContext(
        Settings(models=Path(models), store=store, workers=workers, max_sessions=most, max_sessions_per_owner=most)
    )


async def step(service: Any, barrier: Any, seconds: float) -> tuple[float, float]:
    """Returns the steps per second of this process, and its CPU seconds a step."""
    engine = await service.engine_when_loaded(None)
    made = [await service.sessions.create(engine, None, "", None, b"") for _ in range(SESSIONS)]
    sessions = [session for session, _ in made]
    slots = np.concatenate([session.slots for session in sessions])
    x = np.random.default_rng(0).normal(size=(SESSIONS, 1, FEATURES)).astype(np.float32)

    async def until(end: float) -> int:
        ticks = 0
        while time.perf_counter() < end:
            result = await service.writer.submit_many(sessions, slots, x)
            assert not result.problems, result.problems
            ticks += 1
        return ticks

    await until(time.perf_counter() + WARM_SECONDS)
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    steps = SESSIONS * await until(start + seconds)
    found = steps / (time.perf_counter() - start), (time.process_time() - cpu) / steps
    barrier.wait()  # nobody closes while others measure
    await service.close()
    return found


def work(number: int, models: str, store: str, workers: int, seconds: float, barrier: Any, rates: Any) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    rates.put(asyncio.run(step(context(models, store, workers), barrier, seconds)))


def measure(models: str, store: str, processes: int, seconds: float) -> list[tuple[float, float]]:
    """Returns what `step` returns, of each process."""
    spawn = multiprocessing.get_context("spawn")
    barrier, rates = spawn.Barrier(processes), spawn.Queue()
    parent = None
    workers = 1 if store == "memory" else processes  # without a shared store each is a server of its own
    if workers > 1:
        parent = context(models, store, workers)
        asyncio.run(parent.sessions.leave_to_workers())
    arguments = models, store, workers, seconds, barrier, rates
    if processes == 1:
        work(0, *arguments)
    else:
        started = [spawn.Process(target=work, args=(number, *arguments)) for number in range(processes)]
        for process in started:
            process.start()
        for process in started:
            process.join()
            assert process.exitcode == 0
    if parent is not None:
        asyncio.run(parent.sessions.close())
    return [rates.get() for _ in range(processes)]


def fill(models: str, store: str, count: int) -> None:
    """Makes a store with so many sessions, closed as a server leaves it."""
    from cellserve.service.sessions.session import NO_LIMITS, Room
    from cellserve.service.sessions.stores.lmdb.header import to_key
    from cellserve.service.sessions.stores.records import SessionRecord, VersionStamp, new_revision

    service = context(models, store, 1)
    (engine,) = service.versions.loaded.values()
    model, records = engine.model, service.sessions._client._shards[0]
    room, states = Room(10 * count, "bench", NO_LIMITS), np.random.default_rng(0).bytes(1024)

    def some(start: int) -> Any:
        def job(transaction: Any) -> None:
            for number in range(start, min(start + BATCH, count)):
                stamp = VersionStamp(7, new_revision())
                record = SessionRecord(model.name, model.version, model.digest, b"", stamp, states)
                records.create(transaction, to_key(f"s{number:08}"), record, time.time(), False, room, (0, 0, 0))

        return job

    for start in range(0, count, BATCH):
        records.environment.run(some(start))
    asyncio.run(service.close())


if __name__ == "__main__":
    models, store, what, amount = sys.argv[1:]
    if what == "fill":
        fill(models, store, int(amount))
    else:
        found = measure(models, store, int(what), float(amount))
        rates, cpu = zip(*found, strict=True)
        print(json.dumps({"value": sum(rates), "cpu_us": 1e6 * sum(cpu) / len(cpu)}))
