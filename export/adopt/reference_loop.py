"""Reference implementation: a plain loop over ONNX Runtime, whose results an adopted model must match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from cellserve.export.adopt.tensor_roles import InputRole, Roles
from cellserve.export.errors import ExportError, first_line
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

    def open(self, signature: Signature) -> Runtime:
        """Opens the model with this signature."""


def open_session(content: bytes) -> Any:
    """Opens a graph with plain ONNX Runtime; raises ExportError."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot open the model: {first_line(error)}") from None


def difference(
    original: bytes, roles: Roles, model: SessionFactory, constants: Mapping[str, Array], contexts: Mapping[str, int]
) -> float:
    """Largest difference between the adopted model and the original graph, stepped row by row in a plain loop.

    Relative for values above 1; over outputs and last states.
    """
    told = model.signature
    told = told.model_copy(update={"batch": told.batch or 1})  # whether rows mix is checked later
    x, initial = random_inputs(told, _ROWS, STEPS, np.random.default_rng(1))
    runtime, session = model.open(told), open_session(original)
    outputs, following = [spec.name for spec in told.outputs], [state.following for state in roles.states]
    y = []
    states = initial
    for t in range(STEPS):
        step, states = runtime.run(np.ascontiguousarray(x[:, t : t + 1]), np.ones(_ROWS, np.int32), states)
        y.append(unpack(step))
    worst = 0.0
    repeated = told.batch or 1
    for row in range(_ROWS):
        own = {
            spec.name: np.repeat(np.take(state, [row], spec.batch_axis), repeated, spec.batch_axis)
            for spec, state in zip(told.states, initial, strict=True)
        }
        kept = {name: own.pop(f"{name}.context") for name in contexts}
        for t in range(STEPS):
            feeds = dict(own) | dict(constants)
            for role, part in zip(roles.inputs, unpack(x), strict=True):
                name, step = role.port.name, np.repeat(part[row : row + 1, t], repeated, 0)
                if name in kept:
                    step = np.concatenate([kept[name], step], axis=-1)
                    kept[name] = step[..., -contexts[name] :]
                feeds[name] = _native(step, role)
            given = dict(zip((*outputs, *following), session.run([*outputs, *following], feeds), strict=True))
            own = {state.port.name: given[state.following] for state in roles.states}
            for name, ours in zip(outputs, y[t], strict=True):
                worst = max(worst, _relative_error(ours[row].ravel(), given[name].reshape(repeated, -1)[0]))
        for spec, ours in zip(told.states, states, strict=True):
            if spec.name in own:
                axis = spec.batch_axis
                worst = max(worst, _relative_error(np.take(ours, row, axis), np.take(own[spec.name], 0, axis)))
    return worst


def _native(step: Array, role: InputRole) -> Array:
    """Brings one time step `[batch, *shape]` to the graph's own order of axes."""
    if role.time_axis is not None:
        step = step[:, None]
    if role.batch_axis is None:
        return np.ascontiguousarray(step[0])
    return step if role.order is None else np.ascontiguousarray(step.transpose(role.order))


def _relative_error(ours: Array, theirs: Array) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    off = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
    off = np.where(np.isnan(ours) & np.isnan(theirs), 0, off)
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0))
