"""The real thing on this machine: what a step costs here, and the model beside two replicas over one Redis."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import load, workloads
from bench.scale.costs import COSTS, Costs
from bench.scale.model import Cluster, Cost, simulate
from bench.servers import LOAD_CORE, ROOT, Server, cpu_seconds, pin, redis

REPLICAS = 2
SESSIONS = 64  # of each replica
# Of what a replica can do: loads of small ticks, at which costs are measured beside the full one. With less, a process
# sleeps so long between ticks that it finds its code and data out of the caches.
FEW = 0.3, 0.6
LOADS = 0.25, 0.5, 0.75  # of what the replicas can do together, in the check
# Set before the first run: the model agrees if its p50 and p99 are within this factor, either way.
WITHIN = 1.5
QUIET = 0.05  # of the cores: with more in use by other programs the check says little


class Sample(NamedTuple):
    """A load on one replica, and what was counted meanwhile."""

    load: load.Load
    ticks: float
    redis_seconds: float  # of CPU time
    redis_bytes: float


class Real:
    """Replicas over one store, the first on the servers' core, the others beside the load.

    Args:
        folder: Folder for the model and the store.
        stack: Ends them.
        store: `memory`, `lmdb`, or `redis`.
        replicas: How many.
    """

    def __init__(self, folder: Path, stack: ExitStack, store: str = "redis", replicas: int = 1) -> None:
        self._cores = os.sched_getaffinity(0)
        load.build()
        if not (folder / "artifacts").exists():
            made = [sys.executable, "-m", "bench.network", str(folder)]
            subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
        self.redis: int | None = None
        url = f"lmdb:{folder / 'cells'}" if store == "lmdb" else store
        if store == "redis":
            url, self.redis = stack.enter_context(redis(folder))
            self._redis_port = re.findall(r":(\d+)/", url)[0]
        flags = "serve", "--models", str(folder / "artifacts"), "--store", url, "--port", "{port}"
        self.servers = [Server("redis", "-m", "cellserve.cli", *flags, ready="/readyz") for _ in range(replicas)]
        for number, server in enumerate(self.servers):
            stack.callback(server.stop)
            if number:
                pin(LOAD_CORE, server.process.pid)
        stack.callback(os.sched_setaffinity, 0, self._cores)
        pin(LOAD_CORE)
        self.loads = [workloads.steps(server, SESSIONS) for server in self.servers]

    def spread(self) -> int:
        """Lets all processes use all cores from now on; returns how many these are."""
        for process in (os.getpid(), self.redis, *(server.process.pid for server in self.servers)):
            for thread in Path(f"/proc/{process}/task").iterdir():
                os.sched_setaffinity(int(thread.name), self._cores)
        return len(self._cores)

    def info(self, section: str) -> dict[str, float]:
        """Returns the numbers of a section of Redis's INFO; none for another store."""
        if self.redis is None:
            return {}
        command = ["redis-cli", "-p", self._redis_port, "info", section]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {name: float(value) for name, value in re.findall(r"^(\w+):([\d.]+)\r?$", text, re.M)}

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the replicas, the store, this process and the loads that have ended."""
        servers = sum(server.cpu_seconds() for server in self.servers)
        return servers + cpu_seconds(self.redis or 0) + sum(os.times()[:4])

    def ticks(self) -> float:
        """Returns how many ticks the first replica has run."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.servers[0].port}/metrics").read().decode()
        return sum(float(number) for number in re.findall(r"^cellserve_tick_rows_count\{.*\} (\S+)", text, re.M))

    def sample(self, seconds: float, rate: float | None = None) -> Sample:
        """Loads the first replica, in a closed loop or at random moments."""

        def counted() -> tuple[float, float, float]:
            stats = self.info("stats")
            moved = sum(stats.get(f"total_net_{way}_bytes", 0) for way in ("input", "output"))
            return self.ticks(), cpu_seconds(self.redis) if self.redis else 0.0, moved

        # The load's warm-up is in what is counted, so all of it is in relation to the steps.
        before = counted()
        found = self.loads[0].load(seconds, rate, random=rate is not None)
        share = seconds / (seconds + max(0.1, 0.1 * seconds))
        return Sample(found, *(share * (new - old) for new, old in zip(counted(), before, strict=True)))

    def samples(self, seconds: float) -> list[Sample]:
        """Loads the first replica fully, and with less."""
        full = self.sample(seconds)
        return [full, *(self.sample(seconds, share * full.load.per_s) for share in FEW)]

    def drive(self, seconds: float, rate: float | None) -> list[load.Load]:
        """Loads all replicas at once, each at this rate, at random moments."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda one: one.load(seconds, rate, random=rate is not None), self.loads))


def line(seconds: Sequence[float], ticks: Sequence[float], steps: Sequence[float]) -> Cost:
    """Returns the cost of a tick and of a step that fit CPU times best, by least squares of the relative errors."""
    counted = np.array([ticks, steps]).T / np.array(seconds)[:, None]
    tick, step = np.linalg.lstsq(counted, np.ones(len(seconds)), rcond=None)[0]
    return Cost(max(0.0, 1e6 * tick), max(0.0, 1e6 * step))  # noise can make one negative


def replica_cost(samples: Sequence[Sample]) -> Cost:
    """Returns what a replica's ticks cost."""
    return line([s.load.cpu["server"] for s in samples], [s.ticks for s in samples], [s.load.answers for s in samples])


def redis_cost(samples: Sequence[Sample]) -> Cost:
    """Returns what a tick's writes cost Redis."""
    return line([s.redis_seconds for s in samples], [s.ticks for s in samples], [s.load.answers for s in samples])


def load_cost(samples: Sequence[Sample]) -> Cost:
    """Returns what a tick costs the program that sends the load: it wakes up twice, to send and to receive."""
    loads = [sample.load for sample in samples]
    cpu = [one.busy * one.seconds for one in loads]
    return line(cpu, [one.turns / 2 for one in loads], [one.answers for one in loads])


def measure(folder: Path, seconds: float) -> Costs:
    """Returns the costs on this machine, with those that are not measured as they are."""
    replica: dict[str, Cost] = {}
    for store in ("memory", "lmdb", "redis"):
        with ExitStack() as stack:
            real = Real(folder, stack, store)
            memory = real.info("memory").get("used_memory", 0.0)
            more = workloads.steps(real.servers[0], 1000)
            memory = real.info("memory").get("used_memory", 0.0) - memory
            del more
            samples = real.samples(seconds)
            replica[store] = replica_cost(samples)
    full = samples[0]
    shard, steps = redis_cost(samples), full.load.answers
    own = replica["memory"]
    return replace(
        COSTS,
        http_us=own.step,
        client_us=max(0.0, replica["redis"].step - own.step),
        lmdb_us=max(0.0, replica["lmdb"].step - own.step),
        tick_us=replica["redis"].tick,
        redis_us=shard.step,
        redis_tick_us=shard.tick,
        redis_bytes=full.redis_bytes / steps,
        redis_memory=memory / 1000,
    )


def lateness(seconds: float = 2.0) -> str:
    """Returns a sentence on how late this machine wakes a process that sleeps, while nothing of ours runs."""
    late, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        time.sleep(0.001)
        late.append(1e3 * (time.perf_counter() - start) - 1)
    p50, p99, most = np.percentile(late, (50, 99, 100))
    return f"A sleep of 1 ms alone ends late by {p50:.2f} ms (median), {p99:.2f} ms (p99), {most:.2f} ms (most)."


def used_seconds() -> float:
    """Returns the CPU time that this machine's cores have given to anything, or its host to other machines."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def check(folder: Path, seconds: float) -> Iterator[str]:
    """Yields lines of a table: latencies over one Redis, and those of the model at the same load.

    First of one replica on a core of its own, as the model's plots have it; then of two, which share this machine's
    cores with the Redis and the programs that send the load, and so they do in the model. The model has the costs of
    the same run. What a message takes from one process to another is fitted to the median of a load on one replica.
    """
    yield lateness()
    yield ""
    with ExitStack() as stack:
        real = Real(folder, stack, replicas=REPLICAS)
        samples = real.samples(seconds)
        costs = replica_cost(samples), redis_cost(samples), load_cost(samples)
        alone = Cluster(1, 1, costs[0], costs[1], 0.0, costs[2], None, SESSIONS)
        few = samples[1].load
        wire = max(0.0, 1e3 * few.p50_ms - 1e6 * simulate(alone, few.per_s).p50) / 4  # a step is sent four times
        alone = replace(alone, wire_us=wire)
        yield (
            "CPU time, µs: "
            + ", ".join(
                f"{name} {cost.tick:.0f} a tick and {cost.step:.0f} a step"
                for name, cost in zip(("a replica", "Redis", "the load"), costs, strict=True)
            )
            + f". From one process to another: {wire:.0f} µs."
        )
        yield ""
        yield "| replicas | load | steps/s | p50 real, ms | p50 model | p99 real | p99 model | others use | agrees |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        most = samples[0].load.per_s
        yield from rows(real, "1, a core of its own", alone, most, lambda rate: [real.sample(seconds, rate).load])
        together = replace(alone, replicas=REPLICAS, cores=real.spread())
        most = sum(one.per_s for one in real.drive(seconds, None))
        what = f"{REPLICAS}, on shared cores"
        yield from rows(real, what, together, most, lambda rate: real.drive(seconds, rate / REPLICAS))


def rows(
    real: Real, what: str, cluster: Cluster, most: float, drive: Callable[[float], Sequence[load.Load]]
) -> Iterator[str]:
    """Yields a line of the check's table for each load.

    Args:
        real: What is loaded.
        what: Its name.
        cluster: The model of it.
        most: Steps per second that it can do.
        drive: Loads it with so many steps per second.
    """
    cores = len(os.sched_getaffinity(real.servers[0].process.pid) | os.sched_getaffinity(0))
    for share in LOADS:
        before = used_seconds() - real.cpu_seconds(), time.perf_counter()
        loads = drive(share * most)
        others = (used_seconds() - real.cpu_seconds() - before[0]) / (cores * (time.perf_counter() - before[1]))
        modelled = simulate(cluster, share * most)
        pairs = [
            (sum(getattr(each, name) for each in loads) / len(loads), 1e3 * getattr(modelled, name[:3]))
            for name in ("p50_ms", "p99_ms")
        ]
        verdict = " and ".join(
            name
            for name, (ours, theirs) in zip(("p50", "p99"), pairs, strict=True)
            if 1 / WITHIN <= theirs / ours <= WITHIN
        )
        figures = " | ".join(f"{figure:.2f}" for pair in pairs for figure in pair)
        quiet = "" if others <= QUIET else " (not a quiet machine)"
        yield (
            f"| {what} | {share:.0%} | {share * most:,.0f} | {figures} | {max(0.0, others):.0%} | "
            f"{verdict or 'neither'}{quiet} |"
        )
