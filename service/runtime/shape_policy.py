"""Shapes of runs in which a row's bits depend on its own values only.

Kernels compute the end of a tensor, which does not fill a vector register, with other instructions than the rest, and a
batch of one row with another kernel than larger ones. So a row's bits may depend on its place and on the batch size.
Copies of the first row at the end of each run keep the requests' rows away from there. Which policy is enough is found
by `batch_invariance`, never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import Signature

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ShapePolicy:
    """How a run is padded before it is handed to ONNX Runtime.

    Args:
        name: What the policy is called in model files and in `GET /models/{name}`.
        guard_rows: Rows added at the end, whatever the batch.
        multiple: The number of rows is padded to a multiple of this.
        row_sizes: If given, the only numbers of rows, ascending; larger batches are multiples of the last one.
        step_sizes: The same for time steps.
    """

    name: str
    guard_rows: int = 0
    multiple: int = 1
    row_sizes: tuple[int, ...] = ()
    step_sizes: tuple[int, ...] = ()

    def padded(self, rows: int, steps: int) -> tuple[int, int]:
        """Returns the numbers of rows and time steps to run."""
        rows += self.guard_rows
        return _round_up(rows, self.row_sizes or (self.multiple,)), _round_up(steps, self.step_sizes or (1,))


def _round_up(count: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if count <= size), -(-count // sizes[-1]) * sizes[-1])


ANY_SHAPE = ShapePolicy("any shape")
# In the order in which they are tried: those that pad less come first.
CHEAP_POLICIES = (
    ANY_SHAPE,
    ShapePolicy("multiples of 8 rows", multiple=8),
    ShapePolicy("8 guard rows", guard_rows=8),
    ShapePolicy("multiples of 32 rows", multiple=32),
    ShapePolicy("32 guard rows", guard_rows=32),
)
POLICIES = (*CHEAP_POLICIES, ShapePolicy("fixed shapes", row_sizes=(8, 64, 256), step_sizes=(1, 8, 32)))
ONE_BY_ONE = "one row, one step"  # where no policy holds; the engine's ticks are of this shape then


def policies_from(name: str) -> tuple[ShapePolicy, ...]:
    """Returns the policies to try for a model whose file names one; none if it was proved for no policy."""
    names = [policy.name for policy in POLICIES]
    return POLICIES[names.index(name) :] if name in names else ()


class Padding:
    """The padding of one call of a graph: more rows like the first, more time steps like the last.

    Args:
        policy: Says by how much.
        signature: The graph's tensors.
        shape: Shape of its inputs, `[rows, ...]` or `[rows, steps, ...]`.
        batch_axes: The batch axes of what is given as states, if not the signature's.
    """

    def __init__(
        self, policy: ShapePolicy, signature: Signature, shape: Sequence[int], batch_axes: Sequence[int] | None = None
    ) -> None:
        self._rows, self._signature = shape[0], signature
        self._axes = [spec.batch_axis for spec in signature.states] if batch_axes is None else batch_axes
        # The graph must know where a row ends, or the added steps would change its state.
        self._steps = shape[1] if policy.step_sizes and signature.lengths is not None else None
        rows, steps = policy.padded(self._rows, self._steps or 1)
        self._more_rows, self._more_steps = rows - self._rows, steps - (self._steps or 1)

    def add(
        self, inputs: Sequence[Array], lengths: NDArray[np.int32], states: Sequence[Array]
    ) -> tuple[list[Array], NDArray[np.int32], list[Array]]:
        """Returns the arguments of `Runtime.call`, padded."""
        if self._more_steps:
            inputs = [_repeat(x, -1, self._more_steps, axis=1) for x in inputs]
        return (
            [_repeat(x, 0, self._more_rows, axis=0) for x in inputs],
            _repeat(lengths, 0, self._more_rows, axis=0),
            [_repeat(state, 0, self._more_rows, axis) for state, axis in zip(states, self._axes, strict=True)],
        )

    def remove(self, results: Sequence[Array]) -> list[Array]:
        """Returns the results of `Runtime.call` without what was added."""
        count = len(self._signature.outputs)
        outputs = [y[: self._rows] for y in results[:count]]
        if self._more_steps:
            outputs = [y[:, : self._steps] for y in outputs]
        states = [
            state[(slice(None),) * axis + (slice(self._rows),)]
            for state, axis in zip(results[count:], self._axes, strict=True)
        ]
        return [np.ascontiguousarray(each) for each in (*outputs, *states)]


def _repeat(array: Array, entry: int, times: int, axis: int) -> Array:
    """Appends copies of one entry of an axis to it."""
    return np.concatenate([array, np.repeat(np.take(array, [entry], axis), times, axis)], axis) if times else array
