"""A foreign graph in the layout that the service runs (batch first, then time if there is one), and its signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np

from cellserve.export.adopt.graph_analysis import index_bounds
from cellserve.export.adopt.graph_editor import ForeignGraph
from cellserve.export.adopt.output_axes import Run, find_axes
from cellserve.export.adopt.tensor_roles import (
    CASTS,
    SERVED_TYPES,
    Axes,
    InputRole,
    OutputFlag,
    Roles,
    StateRole,
    served_type,
)
from cellserve.export.adopt.trial import CannotOpen, CannotRun, Trial
from cellserve.export.errors import ExportError
from cellserve.models.signature import Exactness, ModelDocument, Signature, StateSpec, TensorSpec
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime
from cellserve.service.runtime.providers import RuntimeUnavailable
from cellserve.service.runtime.tensor_layout import unpack

Dtype = Literal["float32", "int32", "int64"]
_SMALL_INTEGERS = ("int8", "uint8", "int16", "uint16")


class ServableGraph:
    """The graph, edited to take `[batch, time, ...]`, with the outputs that test runs have shown.

    Args:
        graph: The graph as read, with constants and sizes fixed.
        roles: The roles of its inputs.
        trial: Runs it, in case ONNX Runtime crashes.

    Raises:
        ExportError: Its outputs or next states have the wrong shapes or types.
    """

    def __init__(self, graph: ForeignGraph, roles: Roles, trial: Trial) -> None:
        self.graph = graph
        self.output_axes: dict[str, Axes] = {}
        self.sources: dict[str, str] = {}  # the outputs, and what each is in the original graph
        self._roles, self._trial = roles, trial
        self._shapes: dict[str, tuple[int | str, ...]] = {}
        inputs = tuple(_input_spec(graph, role) for role in roles.inputs)
        self.states: Sequence[StateRole] = (
            *roles.states,
            *(_context_state(graph, role) for role in roles.inputs if role.context),
        )
        for role in roles.inputs:
            graph.serve_input(role.port.name, role.axes, len(role.port.dims or ()), role.port.type)
        for state in self.states:
            graph.serve_state(state)
        self._signature = Signature(
            inputs=inputs,
            outputs=(TensorSpec(name="not known yet", shape=()),),
            states=tuple(
                StateSpec(
                    name=state.port.name,
                    next_name=state.following,
                    dtype=_served(state.port.type),
                    shape=state.shape,
                    batch_axis=state.batch_axis or 0,
                )
                for state in self.states
            ),
            lengths=None,
            time_axis=roles.time_axis,
            batch=roles.batch,
        )
        self._names = self._chosen_outputs()
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

    def _chosen_outputs(self) -> list[str]:
        """The outputs that the user named, or all that are no next states; those of the graph become the same.

        Raises:
            ExportError: There is none, or not the one that was named.
        """
        following = [spec.next_name for spec in self._signature.states]
        known = [port.name for port in self.graph.outputs]
        wanted = [flag.name for flag in self._roles.flags.outputs]
        for name in wanted:
            if name not in known:
                raise ExportError(f"--output {name}: there is no such output: the candidates are {', '.join(known)}")
        wanted = wanted or [name for name in known if name not in following]
        if not wanted:  # as of a GRU cell
            wanted = [state.following for state in self._roles.states]
            if len(wanted) != 1:
                raise ExportError(
                    f"all of its outputs are next states: say which one is the answer too, with --output NAME "
                    f"({', '.join(wanted)})"
                )
        for name in known:
            if name not in wanted and name not in following:
                self.graph.drop_output(name)
        names = []
        for name in wanted:
            names.append(self.graph.answer_with(name) if name in following else name)
            self.sources[names[-1]] = name
        return names

    def _infer_output_specs(self) -> None:
        """Runs the graph to find its outputs; on one row if it declares any number of rows but fails on two."""
        told, refused = self._signature, None
        for batch in (None, 1) if told.batch is None else (told.batch,):
            self._signature = told.model_copy(update={"batch": batch})
            self._shapes = self._input_shapes()
            try:
                outputs = self._outputs(batch or 2)
                break
            except CannotOpen:
                raise
            except ExportError as error:
                refused = refused or error
        else:
            assert refused is not None
            raise refused
        self._signature = self._signature.model_copy(update={"outputs": outputs})
        leads = (self._batch_name(), "time") if told.time_axis else (self._batch_name(),)
        self._shapes |= {spec.name: (*leads, *spec.shape) for spec in outputs}
        self._shapes |= {spec.next_name: self._state_shape(spec, self._batch_name()) for spec in told.states}
        self._probe([(self._signature.batch or 2, 1)])  # the graph as it will be served

    def _outputs(self, rows: int) -> tuple[TensorSpec, ...]:
        """The outputs of runs on so many rows, brought to the service's layout.

        Raises:
            ExportError: They, or the next states, do not fit.
        """
        told = self._signature
        sizes = [(rows, 3 if told.time_axis else 1)]
        if told.time_axis:
            sizes.append((rows, 5))
        if told.batch is None:
            sizes.append((rows + 1, 3 if told.time_axis else 1))
        runs = self._probe(sizes)
        for spec in told.states:
            for run in runs:
                self._check_fed_back(spec, run)
        flags = {flag.name: flag for flag in self._roles.flags.outputs}
        outputs, axes = [], {}
        for name in self._names:
            type = str(runs[0].outputs[name].dtype)
            if type not in SERVED_TYPES and type not in CASTS:
                raise ExportError(f"output {name} is {type}: {', '.join((*SERVED_TYPES, *CASTS))} can be served")
            shapes = [(run.rows, run.time, run.outputs[name].shape) for run in runs]
            flag = flags.get(self.sources[name], OutputFlag(name))
            axes[name] = find_axes(shapes, flag, self._roles, told.batch, self._axis_hint(self.sources[name]))
            shape = runs[0].outputs[name].shape
            rest = tuple(size for axis, size in enumerate(shape) if axis not in axes[name].leading)
            outputs.append(TensorSpec(name=name, dtype=_served(type), shape=rest))
        for name in self._names:
            value = runs[0].outputs[name]
            self.graph.serve_output(name, axes[name], value.ndim, str(value.dtype))
        self.output_axes = axes
        return tuple(outputs)

    def _check_fed_back(self, spec: StateSpec, run: Run) -> None:
        shape, fitting = run.outputs[spec.next_name].shape, self._state_shape(spec, run.rows)
        if shape != fitting:
            raise ExportError(
                f"state {spec.name} is {list(fitting)} and its next one, {spec.next_name}, {list(shape)}: "
                f"it cannot be fed back, give another with --state {spec.name}=OUTPUT[:batch_axis=N]"
            )

    def _axis_hint(self, output: str) -> str:
        """Says which flags could help an output whose axes do not fit; none that was given already."""
        ways = [*self._dim_hint()]
        flags = {flag.name: flag for flag in self._roles.flags.inputs}
        axis = "time_axis" if self._signature.time_axis else "batch_axis"
        for role in self._roles.inputs:
            if getattr(flags.get(role.port.name, role.flag), axis) is None:
                what = "time" if self._signature.time_axis else "the batch"
                ways.append(f"say which axis is {what} with --input {role.port.name}:{axis}=N")
                break
        if getattr(next((f for f in self._roles.flags.outputs if f.name == output), OutputFlag(output)), axis) is None:
            ways.append(f"or of the output with --output {output}:{axis}=N")
        if len(self._names) > 1:
            ways.append("or leave it out: name the others with --output")
        return ", ".join(ways) or "export it with outputs for each row and time step"

    def _dim_hint(self) -> list[str]:
        """Says which dynamic dimension could be fixed, if one is taken as time."""
        if not self._signature.time_axis:
            return []
        role = self._roles.inputs[0]
        assert role.axes.time is not None and role.port.dims is not None
        name = role.port.dims[role.axes.time]
        return [f"if axis {role.axes.time} of {role.port.name} is not time, fix its size with --dim {name}=SIZE"]

    def _probe(self, sizes: Sequence[tuple[int, int]]) -> list[Run]:
        told = self._signature
        names = [port.name for port in self.graph.outputs]
        runs = []
        for rows, time in sizes:
            x, states = random_inputs(told, rows, time, np.random.default_rng(0))
            feeds = {
                spec.name: np.ascontiguousarray(part if told.time_axis else part[:, 0])
                for spec, part in zip(told.inputs, unpack(x), strict=True)
            }
            runs.append(feeds | {spec.name: state for spec, state in zip(told.states, states, strict=True)})
        try:
            ran = self._trial.run(self.content(None), names, runs)
        except CannotOpen as error:
            error.args = (f"{error}{self._circumstances()}",)
            raise
        except CannotRun as error:
            steps = f" of {sizes[0][1]} time steps" if told.time_axis else ""
            error.args = (f"{error}, on {sizes[0][0]} rows{steps}{self._circumstances()}",)
            raise
        return [Run(rows, time, outputs) for (rows, time), outputs in zip(sizes, ran, strict=True)]

    def _circumstances(self) -> str:
        """Says with which constants a graph failed, and which flag could help; empty if neither is known."""
        constants = ", ".join(f"{name}={text}" for name, text in self.graph.frozen.items())
        ways = self._dim_hint() or (["is the graph made for this value?"] if constants else [])
        return (f" with {constants}" if constants else "") + "".join(f": {way}" for way in ways)

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


def _served(type: str) -> Dtype:
    return cast(Dtype, served_type(type))


def _context_state(graph: ForeignGraph, role: InputRole) -> StateRole:
    """Makes the context of an input a state of the graph."""
    assert role.context is not None and role.port.dims is not None
    axis = len(role.port.dims) - 1 if role.context.axis is None else role.context.axis
    if axis == role.axes.batch:
        raise ExportError(f"--context {role.port.name}: axis {axis} of {role.port.name} is its batch")
    port, following = graph.keep_context(role.port, axis, role.context.entries)
    others = (size for place, size in enumerate(port.dims or ()) if place != role.axes.batch)
    shape = tuple(size if isinstance(size, int) else 1 for size in others)
    return StateRole(port, following, role.axes.batch, shape, False)


def _input_spec(graph: ForeignGraph, role: InputRole) -> TensorSpec:
    name, type = role.port.name, role.port.type
    bounds = None
    if type == "bool":
        bounds = (0, 1)
    elif served_type(type) != "float32":
        limits = (int(np.iinfo(type).min), int(np.iinfo(type).max))
        bounds = role.flag.bounds or index_bounds(graph.graph, name) or (limits if type in _SMALL_INTEGERS else None)
        if bounds is None:
            raise ExportError(
                f"{name} takes integers, and the graph does not say which: give --input {name}:bounds=FIRST..LAST, "
                f"or --constant {name}=VALUE if it is always the same"
            )
        if not limits[0] <= bounds[0] <= bounds[1] <= limits[1]:
            raise ExportError(f"--input {name}:bounds={bounds[0]}..{bounds[1]}: {name} is {type}")
    elif role.flag.bounds is not None:
        raise ExportError(f"{name} takes numbers of {type}: only integers have bounds")
    return TensorSpec(name=name, dtype=_served(type), shape=role.shape, bounds=bounds)
