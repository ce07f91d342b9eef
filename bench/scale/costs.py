"""What a step costs, as measured; everything that docs/explanation/scale.md computes comes from these numbers.

Each is CPU time on one core, or bytes, with the command that measured it. Measure again on your machine, and change
them here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a step of an LSTM of 128 units, whose state has 1 KB."""

    # `make bench`, "HTTP JSON, 64 sessions", CPU µs a request of ours, the median of its rows: parsing, model, answer.
    http_us: float = 117.0
    # `make bench`, "sessions in Redis: CPU beyond sessions in memory", without `redis_us`.
    client_us: float = 24.0
    # `python -m bench.scale --measure`: Redis's CPU time for each step, in calls of about 50 sessions, with its file.
    redis_us: float = 21.0
    # `make bench`, "a tick of 256 sessions of 1 KB without HTTP".
    lmdb_us: float = 12.0
    # The part of a tick that does not depend on its rows: `python -m bench.scale --measure`, on a quiet machine.
    tick_us: float = 60.0
    # Half a round trip to the store. Within a zone; on one machine `--measure` shows it.
    wire_us: float = 84.0
    # `python -m bench.scale --measure`: bytes to and from Redis for each step.
    redis_bytes: float = 1464.0
    # A step's request and answer over HTTP, with their heads, of 16 numbers and 4.
    http_bytes: float = 620.0
    # `python -m bench.scale --measure`: Redis's memory for each session of 1 KB, with its entries in the indexes.
    redis_memory: float = 2904.0


@dataclass(frozen=True, slots=True)
class Prices:
    """What is assumed of machines; no measurement, change them to yours."""

    core_hour: float = 0.045  # dollars, on demand, with its share of memory
    gigabyte_hour: float = 0.005  # dollars, of a store's memory beyond that share
    cores_per_machine: int = 32
    shard_gigabytes: float = 24.0  # of a Redis process: larger ones take long to copy to a replica
    use: float = 0.6  # of a core, so that a machine can fail, and p99 stays low


COSTS, PRICES = Costs(), Prices()
