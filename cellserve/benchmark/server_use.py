"""What a server was doing during a load, from its `/metrics` before and after."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cellserve.benchmark.target import BenchFailed, Target

_SAMPLE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class ServerUse:
    """What a server did while a load ran. None where it does not tell."""

    cores: float | None  # processor time divided by time
    running: float  # share of the time in which the model ran
    run_ms: float  # a run of the model, on average
    rows: float  # a run's batch size, on average
    queue_ms: float  # the wait until a run, on average
    padding: float  # share of padding among the time steps that were run


class Scrape:
    """The metrics of a model at one moment.

    Args:
        text: The metrics in Prometheus's format.
        model: Name of the model.
        version: Its version.
    """

    def __init__(self, text: str, model: str, version: str) -> None:
        self._values: dict[str, float] = {}
        for name, labels, value in _SAMPLE.findall(text):
            told = dict(_LABEL.findall(labels))
            if told.get("model", model) == model and told.get("version", version) == version and "le" not in told:
                self._values[name + told.get("stage", "")] = float(value)

    @property
    def is_cellserve(self) -> bool:
        """Whether these are the metrics of Cellserve, and of this model."""
        return "cellserve_tick_rows_sum" in self._values

    def until(self, later: Scrape, seconds: float) -> ServerUse | None:
        """Returns what was done between this and a later moment; None if the model did not run.

        Args:
            later: The metrics then.
            seconds: How long there was load in between.
        """

        def grown(name: str) -> float:
            return later._values.get(name, 0) - self._values.get(name, 0)

        runs, waits = (grown(f"cellserve_stage_duration_seconds_count{stage}") for stage in ("run", "queue"))
        ticks = grown("cellserve_tick_rows_count")
        if runs <= 0 or ticks <= 0 or seconds <= 0:
            return None
        run_seconds = grown("cellserve_stage_duration_seconds_sumrun")
        steps, padding = grown("cellserve_steps_total"), grown("cellserve_padding_steps_total")
        return ServerUse(
            cores=grown("process_cpu_seconds_total") / seconds if "process_cpu_seconds_total" in self._values else None,
            running=run_seconds / seconds,
            run_ms=1e3 * run_seconds / runs,
            rows=grown("cellserve_tick_rows_sum") / ticks,
            queue_ms=1e3 * grown("cellserve_stage_duration_seconds_sumqueue") / waits if waits else 0,
            padding=padding / (steps + padding) if steps else 0,
        )


class Metrics:
    """The `/metrics` of a server, if it has them and the key may read them.

    Args:
        target: The server.
        url: Where its metrics are.
        model: Name of the model.
        version: Its version.
    """

    def __init__(self, target: Target, url: str, model: str, version: str) -> None:
        self._target, self._url, self._model, self._version = target, url, model, version
        self.missing = ""  # why there are none
        self.scrape()

    def scrape(self) -> Scrape | None:
        """Reads the metrics; returns None if that is not possible."""
        if self.missing:
            return None
        try:
            answer = self._target.ask(self._url)
        except BenchFailed as error:
            self.missing = str(error)
            return None
        if answer.status_code != 200:
            hint = ": only an operator's --key may read it" if answer.status_code in (401, 403) else ""
            self.missing = f"{self._url} answers {answer.status_code}{hint}"
            return None
        scrape = Scrape(answer.text, self._model, self._version)
        if not scrape.is_cellserve:
            self.missing = f"{self._url} has none of Cellserve's metrics"
            return None
        return scrape
