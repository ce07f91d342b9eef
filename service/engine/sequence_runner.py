"""Runs whole sequences of a model that cannot be stepped: no slots, no quantum, never cut and never padded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.stats import TickCounts
from cellserve.service.errors import BodyTooLarge, InvalidInput, ModelFailed, NotFinite, Problem, QueueFull
from cellserve.service.model_repository.repository import Model
from cellserve.service.runtime.tensor_layout import parts

Array = NDArray[Any]

_MOST_WAITING = 256  # requests

log = logging.getLogger("cellserve")


class WholeRuns:
    """The runs of one model, in the order of the requests, on a thread of their own.

    Args:
        model: The model.
        max_batch: Rows of a run, at most: sequences of one request that are of one length.
        max_steps: Time steps of a run, over its rows, at most: what a run needs of memory grows with them.
        counts: Of the engine; a run counts as a tick.
    """

    def __init__(self, model: Model, max_batch: int, max_steps: int, counts: TickCounts) -> None:
        self._counts = counts
        self._model, self._max_batch, self._max_steps = model, max_batch, max_steps
        self._executor = ThreadPoolExecutor(1, "whole")
        self._waiting = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is under way."""
        return not self._waiting

    def close(self) -> None:
        """Ends the thread of idle runs."""
        self._executor.shutdown()

    async def run(self, sequences: Sequence[Array], name: str) -> list[Array]:
        """Gives the outputs `[time, *outputs]` of each sequence `[time, *features]`, from zeros.

        Args:
            sequences: Checked.
            name: Of them in the request.

        Raises:
            InvalidInput: A sequence has too few time steps.
            BodyTooLarge: A sequence has too many time steps.
            QueueFull: Too many requests wait.
            NotFinite: An output would not be finite.
            ModelFailed: ONNX Runtime could not run one.
        """
        fewest = self._model.runtime.signature.min_steps
        for number, sequence in enumerate(sequences):
            if len(sequence) < fewest:
                place = f"{name}[{number}]"
                raise InvalidInput(
                    f"{place}: {len(sequence)} time steps, and the model wants {fewest} at least", place=place
                )
            if len(sequence) > self._max_steps:
                raise BodyTooLarge(
                    f"{name}[{number}]: {len(sequence)} time steps, and the model runs each sequence whole: "
                    f"send {self._max_steps} at most",
                    limit=self._max_steps,
                )
        if self._waiting >= _MOST_WAITING:
            raise QueueFull(f"{self._waiting} requests are waiting for model {self._model.name!r}: try again")
        loop = asyncio.get_running_loop()
        outputs: dict[int, Array] = {}
        self._waiting += 1
        try:
            for numbers in self._batches(sequences):
                x = np.stack([sequences[number] for number in numbers])
                # Batch after batch, so that one whose client has gone ends here.
                arrived = perf_counter()
                ys, start = await loop.run_in_executor(self._executor, self._run, x, numbers, name)
                self._counts.ran_whole(len(x), x.shape[0] * x.shape[1], start - arrived, perf_counter() - start)
                outputs.update(zip(numbers, ys, strict=True))
        finally:
            self._waiting -= 1
        return [outputs[number] for number in range(len(sequences))]

    def check(self, states: bool, return_states: bool) -> None:
        """Raises InvalidInput where a request has states to start from, or wants those at the end."""
        if states or return_states:
            place = "states" if states else "return_states"
            raise InvalidInput(
                f"{place}: model {self._model.name!r} runs whole sequences from zeros only, "
                f"{self._model.runtime.signature.predict_only}: leave it out",
                place=place,
            )

    def seconds(self, batch: int, time_steps: int) -> float:
        """Gives no time for a tick: there are none, and the model may not run on as few time steps as are tried."""
        return 0.0

    def _batches(self, sequences: Sequence[Array]) -> list[list[int]]:
        """Gives the numbers of the sequences of each run."""
        alike: dict[int, list[int]] = {}
        for number, sequence in enumerate(sequences):
            alike.setdefault(len(sequence), []).append(number)
        batches = []
        for steps, numbers in alike.items():
            most = max(1, min(self._max_batch, self._max_steps // steps))
            batches += [numbers[start : start + most] for start in range(0, len(numbers), most)]
        return batches

    def _run(self, x: Array, numbers: Sequence[int], name: str) -> tuple[Array, float]:
        """Gives the outputs, and when the run began, in seconds of `time.perf_counter`."""
        runtime, start = self._model.runtime, perf_counter()
        try:
            y, _ = runtime.run(x, np.full(len(x), x.shape[1], np.int32), runtime.zeros(len(x)))
        except Exception as error:
            log.error("model %s failed: %s", self._model.name, error)
            raise _failed(self._model.name) from None
        for row, number in enumerate(numbers):
            if not all(np.isfinite(part).all() for part in parts(y[row])):
                place = f"{name}[{number}]"
                raise NotFinite(f"{place}: the model's output is not finite", place=place)
        return y, start


def _failed(name: str) -> Problem:
    return ModelFailed(f"ONNX Runtime could not run model {name!r} on this request")
