"""Adapts models with several inputs or outputs, no time axis, a fixed batch or no `lengths` to the engine's one call.

The engine always runs `x [batch, time, *features]` with lengths; it knows nothing of such graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import Signature
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack

Array = NDArray[Any]
Lengths = NDArray[np.int32]
Call = Callable[[Sequence[Array], Lengths, Sequence[Array]], list[Array]]


class GraphAdapter:
    """Runs a model on rows of time steps, by as many calls of its graph as necessary.

    Args:
        signature: The model's signature.
        call: Calls the graph: takes the inputs, lengths and states, returns the outputs and next states.
        batch_axes: The batch axes of what is given as states, if not the signature's. What is added to fill a batch is
            zeros.
    """

    def __init__(self, signature: Signature, call: Call, batch_axes: Sequence[int] | None = None) -> None:
        self._signature, self._call = signature, call
        self._outputs = TensorLayout(signature.outputs)
        self._axes = [spec.batch_axis for spec in signature.states] if batch_axes is None else batch_axes

    @property
    def is_passthrough(self) -> bool:
        """Whether a run is a single call of the graph on one array, so that no adapter is needed."""
        signature = self._signature
        alone = len(signature.inputs) == len(signature.outputs) == 1
        return (
            alone
            and signature.time_axis
            and signature.batch is None
            and signature.lengths is not None
            and not signature.predict_only
        )

    def __call__(self, x: Array, lengths: Lengths, states: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Advances every row, as `Runtime.run` does."""
        groups = self._groups(lengths, x.shape[1])
        if groups is None:
            return self._group(x, lengths, states)
        ran = []
        following = [np.empty_like(state) for state in states]
        for rows in groups:
            own = [np.take(state, rows, axis) for state, axis in zip(states, self._axes, strict=True)]
            some, moved = self._group(x[rows, : lengths[rows].max()], lengths[rows], own)
            ran.append((rows, some))
            self._put(following, rows, moved)
        y = self._outputs.zeros(len(x), max(some.shape[1] for _, some in ran))
        for rows, some in ran:
            y[rows, : some.shape[1]] = some
        return y, following

    def _put(self, states: Sequence[Array], rows: Array, own: Sequence[Array]) -> None:
        for state, new, axis in zip(states, own, self._axes, strict=True):
            np.moveaxis(state, axis, 0)[rows] = np.moveaxis(new, axis, 0)

    def _groups(self, lengths: Lengths, time: int) -> list[Array] | None:
        """Returns the rows of each group that the graph can run together; None if it can run all rows as they are."""
        signature = self._signature
        alike = signature.lengths is None and (signature.time_axis or signature.batch is not None)
        if alike and not (lengths == time).all():
            groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        elif signature.batch is None or len(lengths) <= signature.batch:
            return None
        else:
            groups = [np.arange(len(lengths))]
        most = signature.batch or len(lengths)
        return [rows[start : start + most] for rows in groups for start in range(0, len(rows), most)]

    def _group(self, x: Array, lengths: Lengths, states: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Runs rows that the graph can run together, padded with zero rows to its fixed batch size."""
        run = self._whole if self._signature.time_axis else self._steps
        count, missing = len(x), (self._signature.batch or 0) - len(x)
        if missing <= 0:
            return run(x, lengths, states)
        x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
        filled = [
            np.concatenate([state, np.zeros_like(state, shape=_with(state.shape, axis, missing))], axis)
            for state, axis in zip(states, self._axes, strict=True)
        ]
        y, moved = run(x, np.append(lengths, np.full(missing, lengths[-1])).astype(np.int32), filled)
        rows = np.arange(count)
        return y[:count], [np.take(state, rows, axis) for state, axis in zip(moved, self._axes, strict=True)]

    def _whole(self, x: Array, lengths: Lengths, states: Sequence[Array]) -> tuple[Array, list[Array]]:
        outputs, moved = self._call_graph(x, lengths, states)
        if self._signature.predict_only:  # such a model may return one output for all time steps, without a time axis
            specs = self._signature.outputs
            outputs = [
                tensor[:, None] if tensor.ndim == 1 + len(spec.shape) else tensor
                for tensor, spec in zip(outputs, specs, strict=True)
            ]
        return self._outputs.pack(outputs), moved

    def _steps(self, x: Array, lengths: Lengths, states: Sequence[Array]) -> tuple[Array, list[Array]]:
        """Calls a graph of single steps once per time step; rows drop out at their length."""
        if x.shape[1] == 1:
            outputs, moved = self._call_graph(x[:, 0], lengths, states)
            return self._outputs.pack(outputs)[:, None], moved
        y = self._outputs.zeros(*x.shape[:2])
        final = [np.empty_like(state) for state in states]
        rows = np.arange(len(x))
        for t in range(int(lengths.max())):
            outputs, states = self._call_graph(x[rows, t], lengths, states)
            y[rows, t] = self._outputs.pack(outputs)
            continuing = lengths[rows] > t + 1
            if not continuing.all():
                ended = [np.compress(~continuing, state, axis) for state, axis in zip(states, self._axes, strict=True)]
                self._put(final, rows[~continuing], ended)
                states = [np.compress(continuing, state, axis) for state, axis in zip(states, self._axes, strict=True)]
                rows = rows[continuing]
        return y, final

    def _call_graph(self, x: Array, lengths: Lengths, states: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        count = len(self._signature.outputs)
        inputs = [np.ascontiguousarray(part) for part in unpack(x)]
        given = self._call(inputs, lengths, [np.ascontiguousarray(state) for state in states])
        return given[:count], given[count:]


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
