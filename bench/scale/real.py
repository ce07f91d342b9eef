"""The model beside the real thing: two replicas and a Redis on this machine, at the costs that they have here."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench import load, workloads
from bench.scale.model import Cluster, simulate
from bench.servers import LOAD_CORE, ROOT, Server, cpu_seconds, pin, redis

REPLICAS = 2
LOADS = 0.15, 0.3, 0.45, 0.6  # of what a replica can do; with more, this machine's cores are the limit
SESSIONS = 64  # of each replica


class Real:
    """Replicas over one Redis, the first on the servers' core, the others beside the load.

    Args:
        folder: Folder for the model and the Redis.
        stack: Ends them.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        load.build()
        made = [sys.executable, "-m", "bench.network", str(folder)]
        subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
        url, self.redis = stack.enter_context(redis(folder))
        self.redis_port = int(re.findall(r":(\d+)/", url)[0])
        flags = "serve", "--models", str(folder / "artifacts"), "--store", url, "--port", "{port}"
        self.servers = [Server("redis", "-m", "cellserve.cli", *flags, ready="/readyz") for _ in range(REPLICAS)]
        for number, server in enumerate(self.servers):
            stack.callback(server.stop)
            if number:
                pin(LOAD_CORE, server.process.pid)
        pin(LOAD_CORE)
        self.loads = [workloads.steps(server, SESSIONS) for server in self.servers]

    def info(self, section: str) -> dict[str, float]:
        """Returns the numbers of a section of Redis's INFO."""
        command = ["redis-cli", "-p", str(self.redis_port), "info", section]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {name: float(value) for name, value in re.findall(r"^(\w+):([\d.]+)\r?$", text, re.M)}

    def rows(self, server: Server) -> tuple[float, float]:
        """Returns the rows and ticks of a server so far."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read().decode()
        rows, ticks = (
            re.findall(rf"^cellserve_tick_rows_{what}\{{.*\}} (\S+)", text, re.M) for what in ("sum", "count")
        )
        return sum(map(float, rows)), sum(map(float, ticks))

    def drive(self, seconds: float, rate: float | None) -> list[load.Load]:
        """Loads all replicas at once, each at this rate."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda one: one.load(seconds, rate), self.loads))


def measure(folder: Path, seconds: float) -> tuple[Cluster, float]:
    """Prints the costs here; returns them as a cluster of one replica and one shard, and the replica's steps/s."""
    with ExitStack() as stack:
        return _measure(Real(folder, stack), seconds)


def _measure(real: Real, seconds: float) -> tuple[Cluster, float]:
    server, own = real.servers[0], real.loads[0]
    before = real.info("memory")["used_memory"]
    extra = workloads.steps(server, 1000)
    session_bytes = (real.info("memory")["used_memory"] - before) / 1000
    del extra
    traffic, redis_cpu, rows = real.info("stats"), cpu_seconds(real.redis), real.rows(server)
    full = own.load(seconds)
    steps = full.answers
    redis_us = 1e6 * (cpu_seconds(real.redis) - redis_cpu) / steps
    after, now = real.info("stats"), real.rows(server)
    batch = (now[0] - rows[0]) / max(1.0, now[1] - rows[1])
    redis_bytes = sum(
        after[f"total_net_{way}_bytes"] - traffic[f"total_net_{way}_bytes"] for way in ("input", "output")
    )
    many_us = 1e6 * full.cpu["server"] / steps
    slow = own.load(seconds, rate=0.05 * full.per_s)
    one_us = 1e6 * slow.cpu["server"] / slow.answers
    tick_us = max(0.0, (one_us - many_us) / (1 - 1 / max(1.01, batch)))
    step_us = max(1.0, many_us - tick_us / batch)
    wire_us = max(1.0, (1000 * slow.p50_ms - tick_us - step_us - redis_us) / 2)
    print(f"a replica: {full.per_s:,.0f} steps/s, {batch:.1f} rows a tick; CPU: {tick_us:.0f} µs a tick, "
          f"{step_us:.1f} µs a step with its write to Redis")  # fmt: skip
    print(f"Redis: {redis_us:.1f} µs of CPU and {redis_bytes / steps:,.0f} bytes of network a step, "
          f"{session_bytes:,.0f} bytes of memory a session; half a round trip {wire_us:.0f} µs")  # fmt: skip
    return Cluster(1, 1, step_us, 0.0, redis_us, tick_us, wire_us), full.per_s


def check(folder: Path, seconds: float) -> Iterator[str]:
    """Yields lines of a table: latencies of two replicas over one Redis, and those of the model at the same load."""
    with ExitStack() as stack:
        real = Real(folder, stack)
        one, most = _measure(real, seconds)
        cluster = Cluster(REPLICAS, 1, one.step_us, 0.0, one.shard_us, one.tick_us, one.wire_us)
        yield "| steps/s | p50 real, ms | p50 model | p99 real | p99 model |"
        yield "| --- | --- | --- | --- | --- |"
        for share in LOADS:
            rate = share * most
            loads = real.drive(seconds, rate)
            p50, p99 = (sum(getattr(each, name) for each in loads) / len(loads) for name in ("p50_ms", "p99_ms"))
            modelled = simulate(cluster, REPLICAS * rate)
            yield (
                f"| {REPLICAS * rate:,.0f} | {p50:.2f} | {1e3 * modelled.p50:.2f} | {p99:.2f} "
                f"| {1e3 * modelled.p99:.2f} |"
            )
