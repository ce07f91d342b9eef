"""Which settings would serve better, from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cellserve.benchmark.drive import Figures
from cellserve.benchmark.measure import Measured, Spec
from cellserve.benchmark.server_use import ServerUse

_BOUND = 0.85  # share of a core from which on a server counts as bound by it
_SHORT_RUN_MS = 0.5  # shorter runs gain nothing from threads
_LONG_RUN_MS = 20  # longer ones let single steps wait
_LARGEST_BATCH = 65536  # that `--max-batch` allows
_BETTER = 1.1  # what a setting must gain to be worth it


class Advice(NamedTuple):
    """One piece of advice.

    Attributes:
        why: What was seen.
        what: What to do about it, or what came of trying it.
        flags: The flags of `cellserve serve` to try; none if there is nothing to try.
        spec: The load on which to try them.
    """

    why: str
    what: str
    flags: tuple[str, ...] = ()
    spec: Spec | None = None

    def __str__(self) -> str:
        return f"{self.why}: {self.what}"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the server besides the figures.

    Attributes:
        described: The answer to `GET /models/{name}`.
        max_batch: Its `--max-batch`, if known.
        cores: Cores of its machine, if it is this one.
        flags: The flags it was started with, if known.
        shared_store: Whether it is known to have a shared store.
    """

    described: Mapping[str, Any]
    max_batch: int | None
    cores: int | None
    flags: Sequence[str]
    shared_store: bool


class _Seen(NamedTuple):
    """A load, its figures, and what the server did meanwhile."""

    spec: Spec
    figures: Figures
    use: ServerUse
    generator_is_limit: bool

    @property
    def cores(self) -> float:
        """Cores that the server used; 0 if it does not tell."""
        return self.use.cores or 0


def advise(loads: Sequence[Measured], facts: Facts, missing: str) -> list[Advice]:
    """Returns advice from what was measured.

    Args:
        loads: All loads.
        facts: What else is known.
        missing: Why the server's metrics could not be read, or nothing.
    """
    seen = [
        _Seen(load.spec, load.figures, load.use, load.generator_is_limit)
        for load in _best(loads)
        if load.use is not None
    ]
    if not seen:
        return [Advice("no advice on settings", missing or "the model did not run")]
    found = [*_rows(seen, facts), *_max_batch(seen, facts), *_threads(seen, facts), *_json(seen), *_cores(seen, facts)]
    return found or [Advice("no advice on settings", "these figures suggest no other settings")]


def _best(loads: Iterable[Measured]) -> list[Measured]:
    """Returns the load of the highest throughput of each surface."""
    best: dict[str, Measured] = {}
    for load in loads:
        known = best.get(load.spec.surface)
        if known is None or load.figures.steps_per_s > known.figures.steps_per_s:
            best[load.spec.surface] = load
    return list(best.values())


def _rows(seen: Sequence[_Seen], facts: Facts) -> list[Advice]:
    """Whether the model could not be run in batches."""
    alone = [one for one in seen if one.spec.sessions >= 8 and one.use.rows < 1.5]
    if not alone or facts.described.get("exact", True):
        return []
    why = facts.described.get("exactness", "")
    return [Advice(f"{alone[0].spec}: runs have one row, since the model is not proved exact ({why})",
                   "no --max-batch changes that, but another export may")]  # fmt: skip


def _max_batch(seen: Sequence[_Seen], facts: Facts) -> list[Advice]:
    """Whether runs are as large as allowed and more waits, or so large that they take long."""
    found, limit = [], facts.max_batch
    full = [one for one in seen if limit and one.spec.sessions > limit and one.use.rows >= 0.9 * limit]
    if limit and full:
        one, more = full[0], str(min(4 * limit, _LARGEST_BATCH))
        why = f"{one.spec}: the mean batch is {one.use.rows:.0f}, --max-batch is {limit}, and more waits"
        found.append(Advice(why, f"try --max-batch {more}", ("--max-batch", more), one.spec))
    long = [one for one in seen if one.use.run_ms > _LONG_RUN_MS and one.use.rows > 8]
    if long:
        one = long[0]
        why = f"{one.spec}: a run takes {one.use.run_ms:.0f} ms, and every step waits for the run under way"
        found.append(Advice(why, f"--max-batch {one.use.rows / 2:.0f} would halve that, at some cost in steps/s"))
    return found


def _threads(seen: Sequence[_Seen], facts: Facts) -> list[Advice]:
    """Whether the model is what takes the time, in runs that are worth dividing."""
    one = max(seen, key=lambda one: one.use.running)
    on_cpu = facts.described.get("provider", "CPU").startswith("CPU")
    if one.use.running < 0.5 or one.cores > 1.3 or facts.cores == 1 or not on_cpu or "--threads" in facts.flags:
        return []
    why = f"{one.spec}: the model ran {one.use.running:.0%} of the time, {one.use.run_ms:.2g} ms a run"
    if one.use.run_ms < _SHORT_RUN_MS:
        return [Advice(why, "too short for --threads to help")]
    count = str(min(4, facts.cores or 2))
    spare = "" if facts.cores else ", if its machine has cores to spare"
    return [Advice(why, f"try --threads {count}{spare}", ("--threads", count), one.spec)]


def _json(seen: Sequence[_Seen]) -> list[Advice]:
    """Whether the server is busy with HTTP and JSON more than with the model."""
    busy = [one for one in seen if one.cores >= _BOUND and one.use.running < 0.5 * one.cores]
    texts = [one for one in busy if one.spec.surface in ("http", "websocket", "predict")]
    if not texts:
        return []
    one = min(texts, key=lambda one: one.use.running)
    why = f"{one.spec}: {one.cores:.0%} of a core was used, by the model {one.use.running:.0%}; HTTP and JSON the rest"
    if one.spec.surface == "predict":
        return [Advice(why, "safetensors cost less (--surfaces predict-safetensors shows it)")]
    frames = [other.figures.steps_per_s / one.figures.steps_per_s for other in seen if other.spec.surface == "frames"]
    shown = f": here {frames[0]:.1f} times as many steps/s" if frames and frames[0] > 1 else ""
    return [Advice(why, f"binary frames of WS /stream cost less{shown}")]


def _cores(seen: Sequence[_Seen], facts: Facts) -> list[Advice]:
    """Whether the server is bound by one core, or was not busy at all."""
    one = max(seen, key=lambda one: one.cores)
    if one.use.cores is None or (one.spec.rate is not None and one.cores < _BOUND):
        return []
    if one.cores < _BOUND:
        why = f"{one.spec}: the server used {one.cores:.0%} of a core, so it was not the limit"
        more = (
            "--processes 2: the load generator was" if one.generator_is_limit else "more --sessions, on an idle machine"
        )
        return [Advice(why, f"give {more}")]
    if facts.cores == 1 or one.cores > 1.3:
        return []
    why = f"{one.spec}: the server is bound by one core ({one.cores:.0%} used)"
    if facts.shared_store:
        return [Advice(why, "try --workers 2", ("--workers", "2"), one.spec)]
    return [Advice(why, "--workers with a shared --store, or replicas, would use others")]


def judge(flags: Sequence[str], base: Sequence[Measured], tried: Sequence[Measured]) -> str:
    """Returns what a trial showed: each setting was measured several times, in turn with the settings as they are."""
    before, after = ([load.figures.steps_per_s for load in loads] for loads in (base, tried))
    ratio = sum(after) / sum(before) if sum(before) else 0
    p99 = [min(load.figures.p99_ms for load in loads) for loads in (base, tried)]
    means = [sum(rates) / len(rates) for rates in (before, after)]
    told = f"{means[0]:,.0f} to {means[1]:,.0f} steps/s, {ratio:.2f} times; p99 {p99[0]:.3g} to {p99[1]:.3g} ms"
    if ratio >= _BETTER and min(after) > max(before):
        verdict = "better"
    elif ratio <= 1 / _BETTER and max(after) < min(before):
        verdict = "worse"
    else:
        verdict = "no clear difference"
    return f"tried {' '.join(flags)}: {verdict} ({told})"
