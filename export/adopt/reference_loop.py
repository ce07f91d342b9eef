"""Reference implementation: a plain loop over ONNX Runtime, whose results an adopted model must match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cellserve.export.adopt.tensor_roles import Axes, InputRole, Roles, StateRole
from cellserve.export.adopt.trial import Trial
from cellserve.export.adopt.trial_worker import open_session
from cellserve.models.signature import Signature
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack

Array = NDArray[Any]

STEPS, _ROWS = 8, 3


class SessionFactory(Protocol):
    """Opens the model as it will be served."""

    @property
    def signature(self) -> Signature:
        """The model's signature."""

    @property
    def output_axes(self) -> Mapping[str, Axes]:
        """The special axes of each output in the original graph."""

    @property
    def sources(self) -> Mapping[str, str]:
        """The outputs, and what each is in the original graph."""

    @property
    def states(self) -> Sequence[StateRole]:
        """The states, those of contexts last."""

    def open(self, signature: Signature) -> Runtime:
        """Opens the model with this signature."""


def difference(
    original: bytes, roles: Roles, model: SessionFactory, constants: Mapping[str, Array], trial: Trial
) -> float:
    """Largest difference between the adopted model and the original graph, stepped row by row in a plain loop.

    Relative for values above 1; over outputs and last states.
    """
    told = model.signature
    told = told.model_copy(update={"batch": told.batch or 1})  # whether rows mix is checked later
    x, initial = random_inputs(told, _ROWS, STEPS, np.random.default_rng(1))
    runtime = model.open(told)
    outputs = [spec.name for spec in told.outputs]
    y = []
    states = initial
    for t in range(STEPS):
        step, states = runtime.run(np.ascontiguousarray(x[:, t : t + 1]), np.ones(_ROWS, np.int32), states)
        y.append(unpack(step))
    originals = [model.sources[name] for name in outputs]
    loop = PlainLoop(original, roles, model.states, constants, originals, trial)
    repeated = told.batch or 1
    worst = 0.0
    for row in range(_ROWS):
        own = {
            state.port.name: loop.native_state(np.repeat(np.take(value, [row], axis), repeated, axis), state)
            for state, value, axis in _carried(model.states, initial, told)
        }
        for t in range(STEPS):
            given, own = loop.step([np.repeat(part[row : row + 1, t], repeated, 0) for part in unpack(x)], own)
            for name, source, ours in zip(outputs, originals, y[t], strict=True):
                worst = max(worst, _relative_error(ours[row].ravel(), _first(given[source], model.output_axes[name])))
        for state, ours, axis in _carried(model.states, states, told):
            theirs = _first(own[state.port.name], Axes(state.batch_axis))
            worst = max(worst, _relative_error(np.take(ours, row, axis).ravel(), theirs))
    return worst


class PlainLoop:
    """The original graph, stepped as its author would.

    Args:
        original: The graph as it was.
        roles: The roles of its inputs.
        states: Its states, and those that contexts have added.
        constants: Inputs that are always the same.
        outputs: The outputs to return.
        trial: Runs the first step, in case ONNX Runtime crashes.
    """

    def __init__(
        self,
        original: bytes,
        roles: Roles,
        states: Sequence[StateRole],
        constants: Mapping[str, Array],
        outputs: Sequence[str],
        trial: Trial,
    ) -> None:
        self._original, self._constants, self._trial = original, dict(constants), trial
        self._inputs = roles.inputs
        self._contexts = {f"{role.port.name}.context": role for role in roles.inputs if role.context}
        self._following = {
            state.port.name: state.following for state in states if state.port.name not in self._contexts
        }
        self._names = list(dict.fromkeys([*outputs, *self._following.values()]))
        self._session: Any = None

    @staticmethod
    def native_state(value: Array, role: StateRole) -> Array:
        """Brings a state to the graph's own axes and type."""
        value = value if role.batch_axis is not None else value[0]
        return np.asarray(value.astype(role.port.type))

    def step(self, inputs: Sequence[Array], own: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """Runs one time step, given `[batch, *shape]` of each input; returns the outputs and the next states."""
        feeds = {name: value for name, value in own.items() if name not in self._contexts} | self._constants
        kept = {}
        for role, part in zip(self._inputs, inputs, strict=True):
            step = _native(part, role)
            if role.context:
                name, axis = f"{role.port.name}.context", _context_axis(role)
                step = np.concatenate([own[name], step], axis=axis)
                kept[name] = np.take(step, range(step.shape[axis] - role.context.entries, step.shape[axis]), axis)
            feeds[role.port.name] = np.ascontiguousarray(step).reshape(step.shape)
        given = self._run(feeds)
        return given, {name: given[following] for name, following in self._following.items()} | kept

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        if self._session is None:
            self._trial.run(self._original, self._names, [feeds])
            self._session = open_session(self._original)
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))


def _carried(
    states: Sequence[StateRole], values: Sequence[Array], told: Signature
) -> list[tuple[StateRole, Array, int]]:
    """Each state with its value in the service and its batch axis there."""
    axes = [spec.batch_axis for spec in told.states]
    return list(zip(states, values, axes, strict=True))


def _context_axis(role: InputRole) -> int:
    assert role.context is not None
    return len(role.port.dims or ()) - 1 if role.context.axis is None else role.context.axis


def _native(step: Array, role: InputRole) -> Array:
    """Brings one time step `[batch, *shape]` to the graph's own axes and type."""
    axes = role.axes
    if axes.batch is None:
        step = step[0]
    for axis in (axes.time, axes.single):
        if axis is not None:
            step = step[None]
    rank = len(role.port.dims or ())
    incoming = [axis for axis in (axes.single, axes.time, axes.batch) if axis is not None]
    incoming += [axis for axis in range(rank) if axis not in incoming]
    turned = step.transpose([incoming.index(axis) for axis in range(rank)])
    return np.asarray(turned.astype(role.port.type))


def _first(value: Array, axes: Axes) -> Array:
    """The numbers of the first row, in the order of the graph."""
    return (value if axes.batch is None else np.take(value, 0, axes.batch)).ravel()


def _relative_error(ours: Array, theirs: Array) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0, np.abs(ours - theirs) / np.maximum(1, np.abs(theirs)))
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0))
