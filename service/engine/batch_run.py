"""One run of a batch: its result, and the problems of rows that failed or are not finite."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.service.engine.device_arena import DeviceStates
from cellserve.service.engine.run_errors import run_failed
from cellserve.service.engine.work import WorkItem
from cellserve.service.errors import NotFinite, Problem
from cellserve.service.model_repository.model import Model
from cellserve.service.runtime.tensor_layout import unpack

Array = NDArray[Any]

States = Any  # as an arena gathers them: a list of arrays, or DeviceStates

log = logging.getLogger("cellserve")


@dataclass(slots=True)
class BatchResult:
    """The result of a tick's run: y `[batch, time, *outputs]`, the next states, and the rows that failed."""

    y: Array
    states: States
    failed: dict[int, Exception]
    finite_states: Array | None = None  # [batch], of states on a device: whether they are finite
    steps: int = 0  # time steps that were computed, over all rows, padding included
    start: float = 0.0  # seconds of time.perf_counter
    seconds: float = 0.0  # duration
    rerun: bool = False  # whether the batch failed and was run again row by row


def run_batch(model: Model, x: Array, lengths: NDArray[np.int32], states: States) -> BatchResult:
    """Runs a batch; if it fails, runs it again row by row, so that only the rows at fault fail.

    Args:
        model: The model.
        x: `[batch, time, *features]`.
        lengths: `[batch]`, the time steps of each row.
        states: The states before.
    """
    start = time.perf_counter()
    finite = None
    try:
        if isinstance(states, DeviceStates):
            y, finite = states.run(x, lengths)
            following: States = states
        else:
            y, following = model.runtime.run(x, lengths, states)
    except Exception as error:
        if model.runtime.has_lost_device(error):
            return BatchResult(model.outputs.zeros(*x.shape[:2]), states, dict.fromkeys(range(len(x)), error))
        log.error("model %s failed: %s", model.name, error)
        result = _run_rows(model, x, lengths, states, error)
        result.steps, result.rerun = int(lengths.sum()), True
        result.start, result.seconds = start, time.perf_counter() - start
        return result
    return BatchResult(y, following, {}, finite, x.shape[0] * x.shape[1], start, time.perf_counter() - start)


def _run_rows(
    model: Model, x: Array, lengths: NDArray[np.int32], states: States, batch_error: Exception
) -> BatchResult:
    specs = model.runtime.signature.states
    y = model.outputs.zeros(*x.shape[:2])
    if len(x) == 1:
        return BatchResult(y, states, {0: batch_error})
    following: States = states if isinstance(states, DeviceStates) else [state.copy() for state in states]
    finite = np.ones(len(x), bool)
    failed: dict[int, Exception] = {}
    for row, length in enumerate(lengths):
        inputs = np.ascontiguousarray(x[row : row + 1, :length]), lengths[row : row + 1]
        try:
            if isinstance(states, DeviceStates):
                y[row, :length], finite[row : row + 1] = states.part(row).run(*inputs)
                continue
            own = [np.take(state, [row], spec.batch_axis) for state, spec in zip(states, specs, strict=True)]
            y[row, :length], next_states = model.runtime.run(*inputs, own)
        except Exception as error:
            failed[row] = error
            continue
        for spec, state, rows in zip(specs, following, next_states, strict=True):
            np.moveaxis(state, spec.batch_axis, 0)[row] = np.moveaxis(rows, spec.batch_axis, 0)[0]
    return BatchResult(y, following, failed, finite if isinstance(states, DeviceStates) else None)


def record_row_problems(model: Model, item: WorkItem, rows: range, length: int, result: BatchResult) -> None:
    """Records the rows of an item that failed, or whose outputs or next states are not finite."""
    errors: dict[int, Problem] = item.errors_by_row or {}
    for row in rows:
        place = row - rows.start
        if place in errors:
            continue
        if row in result.failed:
            errors[place] = run_failed(model, result.failed[row])
            continue
        each = (np.isfinite(part).reshape(length, -1).all(axis=1) for part in unpack(result.y[row, :length]))
        finite = np.logical_and.reduce(list(each))
        if not finite.all():
            errors[place] = _not_finite(item.steps_done + int(np.argmin(finite)), None)
        elif not _has_finite_states(model, result, row):
            errors[place] = _not_finite(item.steps_done, item.steps_done + length - 1)
    item.errors_by_row = errors or None


def _has_finite_states(model: Model, result: BatchResult, row: int) -> bool:
    if result.finite_states is not None:
        return bool(result.finite_states[row])
    specs = model.runtime.signature.states
    states = (np.take(state, row, spec.batch_axis) for state, spec in zip(result.states, specs, strict=True))
    return all(np.isfinite(state).all() for state in states)


def is_finite(result: BatchResult) -> bool:
    """Whether all outputs and next states are finite."""
    if isinstance(result.states, DeviceStates):
        assert result.finite_states is not None
        return bool(result.finite_states.all()) and all(np.isfinite(part).all() for part in unpack(result.y))
    return all(np.isfinite(array).all() for array in (*unpack(result.y), *result.states))


def _not_finite(first: int, last: int | None) -> Problem:
    where = f"step {first}" if last is None or last == first else f"one of the steps {first} to {last}"
    return NotFinite(
        f"the model's output or next state is not finite after {where} of the request; nothing was applied: "
        f"send inputs (and states) in the range that the model was trained on",
        step=first,
    )
