"""The arithmetic: which processes, shards, network and money serve so many sessions and steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bench.scale.costs import COSTS, PRICES, Costs, Prices

SIZES = (  # live sessions, steps a second
    (10_000, 10_000),
    (1_000_000, 10_000),
    (1_000_000, 100_000),
    (1_000_000, 1_000_000),
    (100_000_000, 100_000),
    (100_000_000, 1_000_000),
    (100_000_000, 10_000_000),
)


@dataclass(frozen=True, slots=True)
class Size:
    """What serves a number of sessions and steps with the sessions in Redis, and on one machine if that does."""

    sessions: int
    steps_per_s: int
    replicas: int  # processes, each with a core
    machines: int
    shards_for_steps: int
    shards_for_memory: int
    gigabits: float  # a second, of clients and stores together
    dollars: float  # for a million steps
    one_machine: int  # processes over one embedded store; 0 if a machine has fewer cores

    @property
    def shards(self) -> int:
        """Shards of the store."""
        return max(self.shards_for_steps, self.shards_for_memory)

    @property
    def breaks_first(self) -> str:
        """The resource that is exhausted first if the load grows."""
        if self.one_machine:
            return "the machine's cores"
        if self.shards_for_memory > self.shards_for_steps:
            return "the shards' memory"
        return "the shards' cores" if self.shards_for_steps > self.replicas else "the replicas' cores"


def size(sessions: int, steps_per_s: int, costs: Costs = COSTS, prices: Prices = PRICES) -> Size:
    """Returns what serves them."""
    use = prices.use * 1e6
    replicas = math.ceil(steps_per_s * (costs.http_us + costs.client_us) / use)
    # Over many shards the writes of a tick come to about one for each: a step costs what a whole call does.
    for_steps = math.ceil(steps_per_s * (costs.redis_us + costs.redis_tick_us) / use)
    memory = sessions * costs.redis_memory / 1e9
    for_memory = math.ceil(memory / prices.shard_gigabytes)
    alone = math.ceil(steps_per_s * (costs.http_us + costs.lmdb_us) / use)
    gigabits = 8 * steps_per_s * (costs.http_bytes + costs.redis_bytes) / 1e9
    an_hour = prices.core_hour * (replicas + max(for_steps, for_memory)) + prices.gigabyte_hour * memory
    if alone <= prices.cores_per_machine:
        an_hour = prices.core_hour * alone
        gigabits = 8 * steps_per_s * costs.http_bytes / 1e9
    return Size(
        sessions, steps_per_s, replicas, math.ceil(replicas / prices.cores_per_machine), for_steps, for_memory,
        gigabits, an_hour / 3600 / steps_per_s * 1e6, alone if alone <= prices.cores_per_machine else 0,
    )  # fmt: skip


def table(costs: Costs = COSTS) -> Iterator[str]:
    """Yields the lines of the table in docs/explanation/scale.md."""
    titles = (
        "sessions",
        "steps/s",
        "one machine",
        "or replicas",
        "shards",
        "Gbit/s",
        "$ a million steps",
        "bottleneck",
    )
    yield f"| {' | '.join(titles)} |"
    yield "| --- " * len(titles) + "|"
    for one in (size(*each, costs) for each in SIZES):
        alone = _count(one.one_machine, "process") if one.one_machine else "no"
        machines = _count(one.machines, "machine")
        cells = (f"{one.sessions:,}", f"{one.steps_per_s:,}", alone, f"{one.replicas:,} on {machines}",
                 f"{one.shards:,}", f"{one.gigabits:.2g}" if one.gigabits < 10 else f"{one.gigabits:,.0f}",
                 f"{one.dollars:.4f}", one.breaks_first)  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _count(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{plural}"
