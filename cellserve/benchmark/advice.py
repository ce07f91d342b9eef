"""Which settings would serve better, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cellserve.benchmark.measure import Measured, Spec

_SHORT_RUN_MS = 0.5  # shorter runs gain nothing from threads
_LONG_RUN_MS = 20  # longer ones let single steps wait
_BETTER = 1.1  # what a setting must gain to be worth it


@dataclass(frozen=True, slots=True)
class Advice:
    """One piece of advice.

    Attributes:
        text: What to do and why.
        flags: The flags of `cellserve serve` to try; none if there is nothing to try.
        spec: The load on which to try them.
    """

    text: str
    flags: tuple[str, ...] = ()
    spec: Spec | None = None


class Facts(NamedTuple):
    """What is known of the server besides the figures.

    Attributes:
        described: The answer to `GET /models/{name}`.
        max_batch: Its `--max-batch`, if known.
        cores: Cores of its machine, if it is this one.
        shared_store: Whether it is known to have a shared store.
    """

    described: Mapping[str, Any]
    max_batch: int | None
    cores: int | None
    shared_store: bool


def advise(loads: Sequence[Measured], facts: Facts, missing: str) -> list[Advice]:
    """Returns advice from what was measured.

    Args:
        loads: All loads.
        facts: What else is known.
        missing: Why the server's metrics could not be read, or nothing.
    """
    used = [load for load in _best(loads) if load.use]
    if not used:
        why = missing or "the model did not run"
        return [Advice(f"no advice on settings, because what the server did is not known: {why}")]
    found = [*_rows(used, facts), *_max_batch(used, facts), *_threads(used, facts), *_cores(used, facts)]
    return found or [Advice("nothing in these figures suggests another setting")]


def _best(loads: Iterable[Measured]) -> list[Measured]:
    """Returns the load of the highest throughput of each surface."""
    best: dict[str, Measured] = {}
    for load in loads:
        known = best.get(load.spec.surface)
        if known is None or load.figures.steps_per_s > known.figures.steps_per_s:
            best[load.spec.surface] = load
    return list(best.values())


def _rows(loads: Sequence[Measured], facts: Facts) -> list[Advice]:
    """Whether the model could not be run in batches."""
    waiting = [load for load in loads if load.spec.sessions >= 8 and load.use and load.use.rows < 1.5]
    if not waiting or facts.described.get("exact", True):
        return []
    told = f"{_at(waiting[0])} the model ran one row at a time: {facts.described.get('exactness', '')}"
    return [Advice(f"{told}: as long as it is not proved exact in batches, --max-batch changes nothing")]


def _max_batch(loads: Sequence[Measured], facts: Facts) -> list[Advice]:
    """Whether runs are as large as allowed and more waits, or so large that they take long."""
    found = []
    for load in loads:
        use, limit = load.use, facts.max_batch
        if use and limit and load.spec.sessions > limit and use.rows >= 0.9 * limit:
            more = str(min(4 * limit, 65536))
            found.append(Advice(f"{_at(load)} the mean batch of {use.rows:.0f} is at --max-batch {limit}, and more "
                                f"waits: try --max-batch {more}", ("--max-batch", more), load.spec))  # fmt: skip
            break
    for load in loads:
        use = load.use
        if use and use.run_ms > _LONG_RUN_MS and use.rows > 8:
            less = int(use.rows / 2)
            found.append(Advice(f"{_at(load)} a run takes {use.run_ms:.0f} ms, and every step waits for the run under "
                                f"way: --max-batch {less} would halve that, at some cost in steps/s"))  # fmt: skip
            break
    return found


def _threads(loads: Sequence[Measured], facts: Facts) -> list[Advice]:
    """Whether the model is what takes the time, in runs that are worth dividing."""
    for load in sorted(loads, key=lambda load: -load.use.running if load.use else 0):
        use = load.use
        if not use or use.running < 0.5 or (use.cores or 0) > 1.3 or facts.cores == 1:
            continue
        told = f"{_at(load)} the model ran {use.running:.0%} of the time, {use.run_ms:.2g} ms a run"
        if use.run_ms < _SHORT_RUN_MS:
            return [Advice(f"{told}: too short for --threads to help")]
        count = "2" if facts.cores is None else str(min(4, facts.cores))
        spare = ", if its machine has cores to spare" if facts.cores is None else ""
        return [Advice(f"{told}: try --threads {count}{spare}", ("--threads", count), load.spec)]
    return []


def _cores(loads: Sequence[Measured], facts: Facts) -> list[Advice]:
    """Whether the server is bound by one core, or was not busy at all."""
    bound = [load for load in loads if load.use and load.use.cores is not None and load.use.cores >= 0.85]
    if not bound:
        idle = [load for load in loads if load.use and load.use.cores is not None and load.spec.rate is None]
        if not idle:
            return []
        most = max(idle, key=lambda load: load.use.cores if load.use and load.use.cores else 0)
        assert most.use
        how = (
            "the load generator was the limit: give --processes 2"
            if most.generator_is_limit
            else "give more --sessions"
        )
        return [Advice(f"{_at(most)} the server used only {most.use.cores:.0%} of a core: to see its limit, {how}")]
    load = min(bound, key=lambda load: load.use.running if load.use else 0)
    assert load.use
    found = []
    frames = next((load for load in loads if load.spec.surface == "frames"), None)
    if load.use.running < 0.5 and load.spec.surface not in ("frames", "predict-safetensors"):
        told = f"{_at(load)} the server used {load.use.cores:.0%} of a core, the model only {load.use.running:.0%}"
        ratio = frames.figures.steps_per_s / load.figures.steps_per_s if frames else 0
        shown = f", here {ratio:.1f} times as many steps/s" if ratio > 1 else ""
        instead = "safetensors" if load.spec.surface == "predict" else f"binary frames of WS /stream{shown}"
        found.append(Advice(f"{told}; the rest is HTTP and JSON: {instead} cost less"))
    if facts.cores == 1:
        return found
    how = "--workers 2" if facts.shared_store else "--workers 2 with --store redis://HOST:PORT"
    text = f"{_at(load)} the server is bound by one core ({load.use.cores:.0%} used): {how} would use others"
    flags = ("--workers", "2") if facts.shared_store else ()
    return [*found, Advice(text, flags, load.spec)]


def _at(load: Measured) -> str:
    return f"{load.spec}:"


def judge(flags: Sequence[str], base: Sequence[Measured], tried: Sequence[Measured]) -> str:
    """Returns what a trial showed: each setting was measured several times, in turn with the settings as they are."""
    before, after = ([load.figures.steps_per_s for load in loads] for loads in (base, tried))
    ratio = sum(after) / sum(before) if sum(before) else 0
    p99s = (min(load.figures.p99_ms for load in loads) for loads in (base, tried))
    told = (f"{sum(before) / len(before):,.0f} to {sum(after) / len(after):,.0f} steps/s ({ratio:.2f} times), "
            "p99 {:.3g} to {:.3g} ms".format(*p99s))  # fmt: skip
    name = " ".join(flags)
    if ratio >= _BETTER and min(after) > max(before):
        return f"tried {name}: {told}: better, use it"
    if ratio <= 1 / _BETTER and max(after) < min(before):
        return f"tried {name}: {told}: worse"
    return f"tried {name}: {told}: no clear difference"
