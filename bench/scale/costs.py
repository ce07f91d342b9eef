"""What a step costs, as measured; everything that docs/explanation/scale.md computes comes from these numbers.

Each is CPU time on one core, or bytes. `make scale SCALE_FLAGS=--measure` measures them on this machine, writes them
here, and computes the page anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a step of an LSTM of 128 units, whose state has 1 KB."""

    # A request's parsing, its row of the model and its answer, with the session in memory.
    http_us: float = 19.4
    # What the session in Redis adds to that in the replica.
    client_us: float = 11.7
    # What it adds in one process over the embedded store.
    lmdb_us: float = 8.7
    # A replica's tick over Redis, beside its steps.
    tick_us: float = 214.4
    # Redis's CPU time, with its file: of a step, and of a tick's writes beside their steps.
    redis_us: float = 7.3
    redis_tick_us: float = 22.4
    # To and from Redis, for each step.
    redis_bytes: float = 1226.4
    # Of Redis, for each session of 1 KB, with its entries in the indexes.
    redis_memory: float = 2943.2
    # From a replica to its shard: an assumption, for machines within a zone.
    wire_us: float = 84.0
    # A step's request and answer over HTTP, with their heads, of 16 numbers and 4: counted once.
    http_bytes: float = 620.0


@dataclass(frozen=True, slots=True)
class Prices:
    """What is assumed of machines; no measurement, change them to yours."""

    core_hour: float = 0.045  # dollars, on demand, with its share of memory
    gigabyte_hour: float = 0.005  # dollars, of a store's memory beyond that share
    cores_per_machine: int = 32
    shard_gigabytes: float = 24.0  # of a Redis process: larger ones take long to copy to a replica
    use: float = 0.6  # of a core, so that a machine can fail, and p99 stays low


COSTS, PRICES = Costs(), Prices()
