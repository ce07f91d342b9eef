"""A discrete-event model of replicas that share the shards of a store, as the engine ticks and the store answers.

Each replica, each shard and each program that sends a load is a process of one thread. It takes all messages that
wait as one turn, which costs something fixed and something for each step in it; in a shard, that is so for the writes
of each tick. A replica's turn with requests is a tick; its writes go to the shards of their sessions, and another turn
of the replica answers its steps when the last of them is done.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from bench.scale.costs import Costs

MAX_BATCH = 256
Message = TypeVar("Message")


class Cost(NamedTuple):
    """Microseconds of CPU time, of a tick or of what belongs to it."""

    tick: float
    step: float  # each step of it


@dataclass(frozen=True, slots=True)
class Cluster:
    """How many there are, and what each costs."""

    replicas: int
    shards: int  # 0: sessions in memory
    replica: Cost  # with its side of the store: half of it before the write, half after
    shard: Cost
    wire_us: float  # from one process to another
    load: Cost | None = None  # of the programs that send the load, one a replica, half before the answer; None: nothing
    cores: int | None = None  # that all share; None: each process has its own
    batch: int = MAX_BATCH  # most steps of a tick

    @classmethod
    def of(cls, costs: Costs, replicas: int, shards: int) -> Cluster:
        """Returns a cluster whose clients use HTTP, and whose processes have a core each."""
        step = costs.http_us + (costs.client_us if shards else 0.0)
        return cls(
            replicas, shards, Cost(costs.tick_us, step), Cost(costs.redis_tick_us, costs.redis_us), costs.wire_us
        )

    @property
    def capacity(self) -> float:
        """Steps a second, at most: in full ticks, of the replicas, the shards or the shared cores."""

        def full(cost: Cost, calls: int = 1) -> float:
            return cost.tick * min(calls, self.batch) / self.batch + cost.step

        most = 1e6 * self.replicas / full(self.replica)
        if self.shards:
            most = min(most, 1e6 * self.shards / full(self.shard, self.shards))
        if self.cores:
            each = full(self.replica) + (full(self.shard, self.shards) if self.shards else 0)
            each += full(self.load) if self.load else 0
            most = min(most, 1e6 * self.cores / each)
        return most


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from the moment at which a step is sent (with no program that sends it: received) to its answer."""

    p50: float
    p99: float
    mean: float
    rows: float  # of a tick, on average


class Machine:
    """Simulated time in microseconds, and cores that all work under way shares in equal parts.

    Args:
        cores: How many; None for as many as there is work.
    """

    def __init__(self, cores: int | None) -> None:
        self.now = 0.0
        self._cores = cores
        self._numbers = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        # All work under way gets on equally fast. So it ends in the order of the sums of its duration and of what each
        # work under way has been given until its start.
        self._given = 0.0
        self._work: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, moment: float, happens: Callable[[], None]) -> None:
        """Plans an event."""
        heapq.heappush(self._events, (moment, next(self._numbers), happens))

    def do(self, duration: float, then: Callable[[], None]) -> None:
        """Begins work that takes so long on a core of its own."""
        heapq.heappush(self._work, (self._given + duration, next(self._numbers), then))

    def run(self) -> None:
        """Lets everything happen."""
        while self._events or self._work:
            speed = 1.0 if self._cores is None else min(1.0, self._cores / max(1, len(self._work)))
            end = self.now + (self._work[0][0] - self._given) / speed if self._work else np.inf
            is_work = not self._events or end <= self._events[0][0]
            moment, _, happens = heapq.heappop(self._work if is_work else self._events)
            moment = end if is_work else moment
            self._given += speed * (moment - self.now)
            self.now = moment
            happens()


class Process(Generic[Message]):
    """A process of one thread: takes the messages that wait, at most a batch, as one turn.

    Args:
        machine: Where it runs.
        batch: Most messages of a turn.
        duration: Microseconds that a turn of these messages takes.
        then: Called with the messages when they are done.
    """

    def __init__(
        self,
        machine: Machine,
        batch: int,
        duration: Callable[[Sequence[Message]], float],
        then: Callable[[Sequence[Message]], None],
    ) -> None:
        self._machine, self._batch, self._duration, self._then = machine, batch, duration, then
        self._waiting: deque[Message] = deque()
        self._busy = False

    def add(self, message: Message) -> None:
        """Gives it a message."""
        self._waiting.append(message)
        if not self._busy:
            self._begin()

    def _begin(self) -> None:
        self._busy = True
        messages = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
        self._machine.do(self._duration(messages), partial(self._end, messages))

    def _end(self, messages: Sequence[Message]) -> None:
        self._then(messages)
        self._busy = False
        if self._waiting:
            self._begin()


@dataclass(slots=True)
class Tick:
    """The steps of a tick, and how many of its writes are not done."""

    steps: Sequence[int]
    missing: int


def simulate(cluster: Cluster, steps_per_s: float, steps: int = 60_000, seed: int = 0) -> Latency:
    """Runs the model with steps that come at random (Poisson) moments, each at a random replica, of a random session.

    Args:
        cluster: The cluster.
        steps_per_s: The load, of all replicas.
        steps: How many steps are simulated; the first tenth is not counted.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1e6 / steps_per_s, steps))
    replica_of = rng.integers(cluster.replicas, size=steps)
    shard_of = rng.integers(max(1, cluster.shards), size=steps)
    answered = np.zeros(steps)
    machine = Machine(cluster.cores)
    turns = 2 if cluster.shards else 1  # of a replica, for each tick
    load = cluster.load
    ticks = 0

    def later(happens: Callable[[], None]) -> None:
        machine.at(machine.now + cluster.wire_us, happens)

    def load_cost(messages: Sequence[int | Tick]) -> float:
        assert load
        return (load.tick + load.step * sum(1 if isinstance(one, int) else len(one.steps) for one in messages)) / 2

    def replica_cost(messages: Sequence[int | Tick]) -> float:
        rows = sum(1 if isinstance(one, int) else len(one.steps) for one in messages)
        return (cluster.replica.tick + cluster.replica.step * rows) / turns

    def shard_cost(writes: Sequence[tuple[Tick, int]]) -> float:
        return sum(cluster.shard.tick + cluster.shard.step * rows for _, rows in writes)

    def load_turn(messages: Sequence[int | Tick]) -> None:
        for one in messages:
            if isinstance(one, int):
                later(partial(replicas[replica_of[one]].add, one))
            else:
                answered[one.steps] = machine.now

    def replica_turn(messages: Sequence[int | Tick]) -> None:
        nonlocal ticks
        steps = [one for one in messages if isinstance(one, int)]
        for one in messages:
            if not isinstance(one, int):
                answer(one)
        ticks += bool(steps)
        if not steps:
            return
        if not cluster.shards:
            answer(Tick(steps, 0))
            return
        rows = np.bincount(shard_of[steps], minlength=cluster.shards)
        touched = np.flatnonzero(rows).tolist()
        tick = Tick(steps, len(touched))
        for shard in touched:
            later(partial(shards[shard].add, (tick, int(rows[shard]))))

    def shard_turn(writes: Sequence[tuple[Tick, int]]) -> None:
        for tick, _ in writes:
            tick.missing -= 1
            if not tick.missing:
                later(partial(replicas[replica_of[tick.steps[0]]].add, tick))

    def answer(tick: Tick) -> None:
        if load:
            later(partial(loads[replica_of[tick.steps[0]]].add, tick))
        else:
            answered[tick.steps] = machine.now

    replicas = [Process(machine, cluster.batch, replica_cost, replica_turn) for _ in range(cluster.replicas)]
    shards = [Process(machine, cluster.batch, shard_cost, shard_turn) for _ in range(cluster.shards)]
    loads = [Process(machine, cluster.batch, load_cost, load_turn) for _ in range(cluster.replicas)]
    first = loads if load else replicas
    for step, moment in enumerate(due.tolist()):
        machine.at(moment, partial(first[replica_of[step]].add, step))
    machine.run()
    counted = (answered - due)[steps // 10 :] / 1e6
    p50, p99 = np.percentile(counted, (50, 99)).tolist()
    return Latency(p50, p99, float(counted.mean()), steps / ticks)
