"""What users of a foreign model do by hand: a plain loop over ONNX Runtime; an adopted model must give the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from cellserve.export.adopt.tensor_roles import InputRole, Roles
from cellserve.export.errors import ExportError
from cellserve.models.signature import Signature
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.tensor_layout import unpack

Array = NDArray[Any]

STEPS, _ROWS = 8, 3


class Opens(Protocol):
    """What opens the model as it will be served."""

    @property
    def signature(self) -> Signature:
        """Of the model."""

    def open(self, signature: Signature) -> Runtime:
        """Opens it."""


def opened(content: bytes) -> Any:
    """Opens a graph with ONNX Runtime as anyone would; raises ExportError."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    try:
        return ort.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot open the model: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Gives what ONNX Runtime says, in one line."""
    line = str(error).strip().splitlines()[0].removeprefix("[ONNXRuntimeError] : ")
    return line.partition("Status Message: ")[2] or line


def difference(
    original: bytes, roles: Roles, model: Opens, constants: Mapping[str, Array], contexts: Mapping[str, int]
) -> float:
    """Steps the graph as it was in a plain loop, row by row, and the adopted model; gives the largest difference.

    Relative to numbers beyond 1, over outputs and last states.
    """
    told = model.signature
    told = told.model_copy(update={"batch": told.batch or 1})  # whether rows mix is found out later
    x, initial = random_inputs(told, _ROWS, STEPS, np.random.default_rng(1))
    runtime, session = model.open(told), opened(original)
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
                worst = max(worst, _off(ours[row].ravel(), given[name].reshape(repeated, -1)[0]))
        for spec, ours in zip(told.states, states, strict=True):
            if spec.name in own:
                axis = spec.batch_axis
                worst = max(worst, _off(np.take(ours, row, axis), np.take(own[spec.name], 0, axis)))
    return worst


def _native(step: Array, role: InputRole) -> Array:
    """Brings one time step `[batch, *shape]` to the axes that the graph has of its own."""
    if role.time_axis is not None:
        step = step[:, None]
    if role.batch_axis is None:
        return np.ascontiguousarray(step[0])
    return step if role.order is None else np.ascontiguousarray(step.transpose(role.order))


def _off(ours: Array, theirs: Array) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    off = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
    off = np.where(np.isnan(ours) & np.isnan(theirs), 0, off)
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0))
