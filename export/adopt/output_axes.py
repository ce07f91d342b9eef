"""Finds which axes of an output are its batch and time, from runs on different numbers of rows and time steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cellserve.export.adopt.tensor_roles import NO_AXIS, Axes, OutputFlag, Roles
from cellserve.export.errors import ExportError


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the graph, and its outputs by name."""

    rows: int
    time: int
    outputs: dict[str, Any]


def find_axes(
    shapes: Sequence[tuple[int, int, tuple[int, ...]]], flag: OutputFlag, roles: Roles, batch: int | None, hint: str
) -> Axes:
    """Finds the special axes of one output.

    Args:
        shapes: Rows, time steps and the output's shape, of each run.
        flag: What the user says about it.
        roles: The roles of the inputs: of several axes that could be, the one at the inputs' place is taken.
        batch: The number of rows, if the graph fixes it.
        hint: What to do if there are no such axes.

    Raises:
        ExportError: It has no batch or no time axis, or not the one that the user gave.
    """
    rows, time, first = shapes[0]
    like = roles.inputs[0].axes

    def refuse(what: str) -> ExportError:
        of = f"{rows} rows of {time} time steps" if roles.time_axis else f"{rows} row{'s' if rows > 1 else ''}"
        return ExportError(f"output {flag.name} has shape {list(first)} for {of}: {what}: {hint}")

    if any(len(shape) != len(first) for *_, shape in shapes):
        raise refuse("its number of axes changes from run to run")
    places = range(len(first))
    times = [axis for axis in places if all(shape[axis] == steps for _, steps, shape in shapes)]
    batches = [axis for axis in places if all(shape[axis] == count for count, _, shape in shapes)]
    time_axis = None
    if roles.time_axis:
        time_axis = _chosen(times, flag.time_axis, like.time, refuse, "time")
        if time_axis is None:
            raise refuse("no axis of it is time")
    if all(role.axes.batch is None for role in roles.inputs) and flag.batch_axis is None:
        batch_axis = None
    else:
        left = [axis for axis in batches if axis != time_axis]
        batch_axis = _chosen(left, flag.batch_axis, like.batch, refuse, "the batch")
    if batch_axis is None and batch != 1:
        raise refuse("no axis of it is the batch")
    special = (batch_axis, time_axis)
    changing = [axis for axis in places if axis not in special and len({shape[axis] for *_, shape in shapes}) > 1]
    if changing:
        raise refuse(
            f"axis {changing[0]} of it changes with the number of {'time steps' if roles.time_axis else 'rows'}"
        )
    single = like.single
    if single is not None and (single >= len(first) or first[single] != 1 or single in special):
        single = None
    return Axes(batch_axis, time_axis, single)


def _chosen(candidates: Sequence[int], flag: int | None, like: int | None, refuse: Any, what: str) -> int | None:
    """The axis that the user gave, or that of the inputs if it fits, or the first that does."""
    if flag == NO_AXIS:
        return None
    if flag is not None:
        if flag not in candidates:
            raise refuse(f"axis {flag} of it is not {what}")
        return flag
    return like if like in candidates else next(iter(candidates), None)
