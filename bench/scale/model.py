"""A discrete-event model of replicas that share the shards of a store, as the engine ticks and the store answers.

A replica is one thread. It takes all steps that wait, at most `MAX_BATCH`, as a tick, and computes for
`tick + rows * (step + client)`. The tick's writes then go to the shards of their sessions, each a queue of its own. A
step is answered when the tick's last write is.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from bench.scale.costs import Costs

MAX_BATCH = 256


@dataclass(frozen=True, slots=True)
class Cluster:
    """How many there are, and what each step costs, in microseconds."""

    replicas: int
    shards: int  # 0: sessions in memory
    step_us: float
    client_us: float
    shard_us: float
    tick_us: float
    wire_us: float

    @classmethod
    def of(cls, costs: Costs, replicas: int, shards: int) -> Cluster:
        """Returns a cluster whose clients use HTTP."""
        return cls(
            replicas, shards, costs.http_us, costs.client_us if shards else 0.0, costs.redis_us, costs.tick_us,
            costs.wire_us,
        )  # fmt: skip

    @property
    def capacity(self) -> float:
        """Steps a second, at most: those of the replicas, or of the shards if these are fewer."""
        tick = self.tick_us / MAX_BATCH + self.step_us + self.client_us
        own = 1e6 * self.replicas / tick
        return min(own, 1e6 * self.shards / self.shard_us) if self.shards else own


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from a step's arrival at a replica to its answer."""

    p50: float
    p99: float
    rows: float  # of a tick, on average


def simulate(cluster: Cluster, steps_per_s: float, steps: int = 60_000, seed: int = 0) -> Latency:
    """Runs the model with arrivals at random (Poisson) moments, each at a random replica, of a random session.

    Args:
        cluster: The cluster.
        steps_per_s: The load, of all replicas.
        steps: How many steps are simulated; the first tenth is not counted.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1e6 / steps_per_s, steps))
    replica_of = rng.integers(cluster.replicas, size=steps)
    shard_of = rng.integers(max(1, cluster.shards), size=steps)
    answered = np.zeros(steps)
    waiting: list[deque[int]] = [deque() for _ in range(cluster.replicas)]
    busy = [False] * cluster.replicas
    free_at = [0.0] * cluster.shards
    ends: list[tuple[float, int, list[int]]] = []  # ticks that are computed: when, by which replica, of which steps
    ticks = 0

    def begin(replica: int, now: float) -> None:
        nonlocal ticks
        queue = waiting[replica]
        batch = [queue.popleft() for _ in range(min(MAX_BATCH, len(queue)))]
        ticks += 1
        busy[replica] = True
        seconds = cluster.tick_us + len(batch) * (cluster.step_us + cluster.client_us)
        heapq.heappush(ends, (now + seconds, replica, batch))

    def end(now: float, replica: int, batch: list[int]) -> None:
        done = now
        if cluster.shards:
            counts = np.bincount(shard_of[batch], minlength=cluster.shards)
            for shard in np.flatnonzero(counts):
                start = max(now + cluster.wire_us, free_at[shard])
                free_at[shard] = start + counts[shard] * cluster.shard_us
                done = max(done, free_at[shard] + cluster.wire_us)
        answered[batch] = done
        busy[replica] = False
        if waiting[replica]:
            begin(replica, now)

    for step in range(steps):
        now = arrivals[step]
        while ends and ends[0][0] <= now:
            end(*heapq.heappop(ends))
        replica = int(replica_of[step])
        waiting[replica].append(step)
        if not busy[replica]:
            begin(replica, now)
    while ends:
        end(*heapq.heappop(ends))
    counted = (answered - arrivals)[steps // 10 :] / 1e6
    return Latency(float(np.percentile(counted, 50)), float(np.percentile(counted, 99)), steps / ticks)
