"""Compares an adopted model with the graph as it was, and shows a person what it has become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from export.errors import ExportError
from export.roles import InputRole, Roles
from models.signature import ModelDocument, Signature, TensorSpec
from service.exactness import draw
from service.layout import parts
from service.runtime import Runtime

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


def difference_from_the_original(
    original: bytes, roles: Roles, model: Opens, constants: Mapping[str, Array], contexts: Mapping[str, int]
) -> float:
    """Steps the graph as it was in a plain loop, row by row, and the adopted model; gives the largest difference.

    Relative to numbers beyond 1, over outputs and last states.
    """
    told = model.signature
    told = told.model_copy(update={"batch": told.batch or 1})  # whether rows mix is found out later
    x, initial = draw(told, _ROWS, STEPS, np.random.default_rng(1))
    runtime, session = model.open(told), opened(original)
    outputs, following = [spec.name for spec in told.outputs], [state.following for state in roles.states]
    y = []
    states = initial
    for t in range(STEPS):
        step, states = runtime.run(np.ascontiguousarray(x[:, t : t + 1]), np.ones(_ROWS, np.int32), states)
        y.append(parts(step))
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
            for role, part in zip(roles.inputs, parts(x), strict=True):
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
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0))


def show(
    console: Console,
    path: str,
    document: ModelDocument,
    roles: Roles,
    constants: Mapping[str, Array],
    contexts: Mapping[str, int],
    size: int,
) -> None:
    """Prints what was found, what was proved, and what the service will do."""
    told = document.signature
    table = Table(title=f"adopted {path}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("a time step takes", _specs(told.inputs))
    table.add_row("gives", _specs(told.outputs))
    for state in roles.states:
        how = "found by its name" if state.found else "as told"
        table.add_row(
            "state",
            f"{state.port.name} → {state.following} {list(state.shape)}, batch at axis {state.batch_axis}, {how}",
        )
    for name, entries in contexts.items():
        table.add_row("context", f"the last {entries} entries of {name} stand before those of the next step")
    for name, value in constants.items():
        table.add_row("constant", f"{name} = {value.tolist()}")
    table.add_row(
        "rows of a run", "any number" if told.batch is None else f"{told.batch}: more are run one after another"
    )
    table.add_row("time axis", "yes" if told.time_axis else "none: a run is one time step")
    table.add_row("the graph as it was", f"the same to {document.parity['original']:.1e} in a plain loop")
    table.add_row("bit identity", ("yes: " if document.exactness.proved else "NO: ") + document.exactness.why)
    times = ", ".join(f"{shape} {row['ours']:.0f}" for shape, row in document.timings.items() if shape != "unit")
    table.add_row("microseconds a run", f"{times} (batch x time)")
    table.add_row("size", f"{size / 1024:.1f} KiB")
    table.add_row("the service will", _promise(document))
    console.print(table)


def _promise(document: ModelDocument) -> str:
    told = document.signature
    if told.predict_only is not None:
        return f"answer POST /predict alone, and sessions with 422: {told.predict_only}"
    if not document.exactness.proved:
        return "step it in sessions, one row and one time step a run: no run ever mixes sessions"
    if told.batch is not None:
        return "step it in sessions, each with the bits of a run of its own"
    return "step it in sessions, many to a run, each with the bits of a run of its own"


def _specs(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(
        f"{spec.name} {list(spec.shape)} {spec.dtype}" + (f" {spec.bounds[0]}..{spec.bounds[1]}" if spec.bounds else "")
        for spec in specs
    )
