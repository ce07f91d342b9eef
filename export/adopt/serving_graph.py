"""A foreign graph in the layout that the service runs (batch first, then time if there is one), and its signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cellserve.export.adopt import reference_loop
from cellserve.export.adopt.graph_editor import ForeignGraph
from cellserve.export.adopt.tensor_roles import SERVED_TYPES, InputRole, Roles
from cellserve.export.errors import ExportError, first_line
from cellserve.models.signature import Exactness, ModelDocument, Signature, StateSpec, TensorSpec
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime, RuntimeUnavailable
from cellserve.service.runtime.tensor_layout import unpack


class ServableGraph:
    """The graph, edited to take `[batch, time, ...]`, with the outputs that test runs have shown.

    Args:
        graph: The graph as read, with constants and sizes fixed.
        roles: The roles of its inputs.
        contexts: For inputs by name, how many of their last entries precede those of the next step.

    Raises:
        ExportError: Its outputs or next states have the wrong shapes or types.
    """

    def __init__(self, graph: ForeignGraph, roles: Roles, contexts: Mapping[str, int]) -> None:
        self.graph = graph
        self._shapes: dict[str, tuple[int | str, ...]] = {}
        contexts_of = [_with_context(graph, roles, name, size) for name, size in contexts.items()]
        for role in roles.inputs:
            if role.batch_axis is None:
                graph.add_batch_axis(role.port.name, True)
            elif role.order is not None:
                graph.transpose_input(role.port.name, role.order)
        self._signature = Signature(
            inputs=tuple(_input_spec(graph, role, contexts.get(role.port.name, 0)) for role in roles.inputs),
            outputs=(TensorSpec(name="not known yet", shape=()),),
            states=(
                *(
                    StateSpec(
                        name=state.port.name,
                        next_name=state.following,
                        dtype=state.port.type,
                        shape=state.shape,
                        batch_axis=state.batch_axis,
                    )
                    for state in roles.states
                ),
                *contexts_of,
            ),
            lengths=None,
            time_axis=roles.time_axis,
            batch=roles.batch,
        )
        following = {state.next_name for state in self._signature.states}
        self._names = [port.name for port in graph.outputs if port.name not in following]
        if not self._names:
            raise ExportError("all of its outputs are next states: there is none to answer with")
        if all(role.batch_axis is None for role in roles.inputs):
            for name in self._names:
                graph.add_batch_axis(name, False)
        self._time_first = any(role.order is not None and role.time_axis == 0 for role in roles.inputs)
        self._infer_output_specs()

    @property
    def signature(self) -> Signature:
        """The signature before anything is proved."""
        return self._signature

    def content(self, document: ModelDocument | None) -> bytes:
        """Returns the model file."""
        return self.graph.to_bytes(self._shapes, document)

    def open(self, signature: Signature) -> Runtime:
        """Opens the model as it will be served."""
        unproved = Exactness(proved=False, why="not proved yet")
        document = ModelDocument(name="adopted", signature=signature, exactness=unproved)
        try:
            return Runtime(self.content(document))
        except RuntimeUnavailable as error:
            raise ExportError(str(error)) from None

    def _infer_output_specs(self) -> None:
        """Runs the graph to find its outputs; on one row if it declares any number of rows but fails on two."""
        told, refused = self._signature, None
        for batch in (None, 1) if told.batch is None else (told.batch,):
            self._signature = told.model_copy(update={"batch": batch})
            self._shapes = self._input_shapes()
            try:
                outputs = self._outputs(batch or 2)
                break
            except ExportError as error:
                refused = refused or error
        else:
            assert refused is not None
            raise refused
        self._signature = self._signature.model_copy(update={"outputs": outputs})
        leads = (self._batch_name(), "time") if told.time_axis else (self._batch_name(),)
        self._shapes |= {spec.name: (*leads, *spec.shape) for spec in outputs}
        self._shapes |= {spec.next_name: self._state_shape(spec, self._batch_name()) for spec in told.states}

    def _outputs(self, rows: int) -> tuple[TensorSpec, ...]:
        """The outputs of a run on so many rows; raises ExportError if they or the next states do not fit."""
        told = self._signature
        ran = self._probe(rows, 3)
        if self._time_first:
            for name in self._names:
                if ran[name].ndim > 1:
                    self.graph.transpose_output(name, (1, 0, *range(2, ran[name].ndim)))
            self._time_first = False
            ran = self._probe(rows, 3)
        longer = self._probe(rows, 5) if told.time_axis else ran
        leading = (rows, 3) if told.time_axis else (rows,)
        outputs = []
        for name in self._names:
            shape, again = ran[name].shape, longer[name].shape
            if shape[: len(leading)] != leading or (told.time_axis and again != (rows, 5, *shape[2:])):
                of = f"{rows} rows of 3 time steps" if told.time_axis else f"{rows} rows"
                wanted = "[batch, time, ...]" if told.time_axis else "[batch, ...]"
                hint = (
                    self._suggest_flag()
                    if told.time_axis
                    else "give the axis of the batch with --input NAME:batch_axis=N"
                )
                raise ExportError(f"output {name} has shape {list(shape)} for {of}, but must be {wanted}: {hint}")
            if str(ran[name].dtype) not in SERVED_TYPES:
                raise ExportError(f"output {name} is {ran[name].dtype}: {', '.join(SERVED_TYPES)} can be served")
            outputs.append(TensorSpec(name=name, dtype=str(ran[name].dtype), shape=shape[len(leading) :]))
        for spec in told.states:
            shape, fitting = ran[spec.next_name].shape, self._state_shape(spec, rows)
            if shape != fitting:
                raise ExportError(
                    f"state {spec.name} is {list(fitting)} and its next one, {spec.next_name}, {list(shape)}: "
                    f"it cannot be fed back, give another with --state {spec.name}=OUTPUT[:batch_axis=N]"
                )
        return tuple(outputs)

    def _suggest_flag(self) -> str:
        dims = [dim for port in self.graph.inputs for dim in port.dims or () if isinstance(dim, str)]
        names = ", ".join(sorted(set(dims)))
        return f"fix an axis that is not time with --dim NAME=VALUE (of {names}), or say --input NAME:time_axis=N"

    def _probe(self, rows: int, time: int) -> dict[str, Any]:
        told = self._signature
        x, states = random_inputs(told, rows, time, np.random.default_rng(0))
        feeds = {
            spec.name: np.ascontiguousarray(part if told.time_axis else part[:, 0])
            for spec, part in zip(told.inputs, unpack(x), strict=True)
        }
        feeds |= {spec.name: state for spec, state in zip(told.states, states, strict=True)}
        session = reference_loop.open_session(self.content(None))
        names = [port.name for port in self.graph.outputs]
        try:
            return dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:
            steps = f" of {time} time steps" if told.time_axis else ""
            hint = f": {self._suggest_flag()}" if told.time_axis else ""
            why = first_line(error)
            raise ExportError(f"it does not run on {rows} rows{steps}, {why}{hint}") from None

    def _input_shapes(self) -> dict[str, tuple[int | str, ...]]:
        told, batch = self._signature, self._batch_name()
        leads = (batch, "time") if told.time_axis else (batch,)
        inputs = {spec.name: (*leads, *spec.shape) for spec in told.inputs}
        return inputs | {spec.name: self._state_shape(spec, batch) for spec in told.states}

    def _batch_name(self) -> int | str:
        return self._signature.batch or "batch"

    @staticmethod
    def _state_shape(spec: StateSpec, batch: Any) -> tuple[Any, ...]:
        return (*spec.shape[: spec.batch_axis], batch, *spec.shape[spec.batch_axis :])


def _with_context(graph: ForeignGraph, roles: Roles, name: str, size: int) -> StateSpec:
    role = next(role for role in roles.inputs if role.port.name == name)
    if role.time_axis is not None or role.batch_axis != 0 or not role.shape:
        raise ExportError(f"--context {name}: only of an input [batch, ..., entries] without a time axis")
    if not 0 < size < role.shape[-1]:
        raise ExportError(
            f"--context {name}={size}: a step of the graph has {role.shape[-1]} entries, context and new ones: "
            f"give from 1 to {role.shape[-1] - 1}"
        )
    state, following = graph.keep_context(name, size)
    return StateSpec(name=state, next_name=following, dtype=role.port.type, shape=(*role.shape[:-1], size))


def _input_spec(graph: ForeignGraph, role: InputRole, context: int) -> TensorSpec:
    name, shape = role.port.name, role.shape
    bounds = None
    if role.port.type != "float32":
        bounds = role.flag.bounds or graph.bounds(name)
        if bounds is None:
            raise ExportError(
                f"{name} takes integers, and the graph does not say which: give --input {name}:bounds=FIRST..LAST"
            )
    elif role.flag.bounds is not None:
        raise ExportError(f"{name} takes numbers of {role.port.type}: only integers have bounds")
    if context:
        shape = (*shape[:-1], shape[-1] - context)
    return TensorSpec(name=name, dtype=role.port.type, shape=shape, bounds=bounds)
