"""Adopts a stateful ONNX model that was made elsewhere: finds its states, proves it, writes it, says what came out."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from export import adopted, artifacts
from export.errors import ExportError
from export.foreign import ForeignGraph
from export.roles import SERVED_TYPES, InputFlag, Roles, StateFlag, find_roles
from models.signature import MODEL_NAME, Exactness, ModelDocument, Signature, StateSpec, TensorSpec
from service.exactness import SHORT, WHOLE, Differs, Effort, compare, draw
from service.layout import parts
from service.runtime import Runtime, RuntimeUnavailable

LIBRARIES = ("onnx", "onnxruntime")
TOLERANCE = 1e-5  # of parity: |ours - theirs| <= TOLERANCE * max(1, |theirs|)
_ROUNDING = 1e-3  # chunks that differ by more do not differ by rounding: the model looks at other time steps
_PATIENCE = 120.0  # seconds that the whole proof may take; else a short one is made


@dataclass(frozen=True, slots=True)
class Request:
    """What to adopt, and what the user says of it."""

    model: Path
    name: str
    artifacts: Path = Path("artifacts")
    version: int | None = None
    states: tuple[StateFlag, ...] = ()
    inputs: tuple[InputFlag, ...] = ()
    constants: Mapping[str, str] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    contexts: Mapping[str, int] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    description: str = ""
    default_output: Literal["last", "all"] = "all"


def adopt(request: Request, console: Console) -> Path:
    """Adopts one model; gives the folder that it was written to.

    Raises:
        ExportError: It cannot be served, or something must be said about it first; nothing has been written.
    """
    with console.status("reading") as status:
        graph = ForeignGraph(request.model)
        constants = {name: graph.bake(name, text) for name, text in request.constants.items()}
        graph.fix(request.dims)
        roles = find_roles(graph.inputs, graph.outputs, request.inputs, request.states, request.contexts)
        model = _Model(graph, roles, request.contexts)
        status.update("running it beside the graph as it was")
        difference = adopted.difference_from_the_original(graph.original, roles, model, constants, request.contexts)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"what comes of it is off by {difference:.1e} from the graph as it was in a plain loop: is each "
                f":batch_axis right? Otherwise it is a mistake of ours, please report it with the model"
            )
        status.update("proving that neither batch nor chunks change a bit")
        signature, exactness = _proved(model)
        runtime = model.open(signature)
        status.update("measuring")
        shapes = [(1, 1), (64, 1), (1, 50)] if signature.time_axis else [(1, 1), (64, 1)]
        timings = {f"{rows}x{steps}": {"ours": runtime.seconds(rows, steps) * 1e6} for rows, steps in shapes}
        labels = request.labels
        if labels and signature.outputs[0].shape[-1:] != (len(labels),):
            raise ExportError(f"{len(labels)} labels for an output of shape {list(signature.outputs[0].shape)}")
        document = ModelDocument(
            name=request.name,
            signature=signature.model_copy(update={"default_output": request.default_output}),
            description=request.description,
            labels=labels,
            form="ONNX made elsewhere",
            operators=graph.operators,
            parity={"original": difference, "time_steps": adopted.STEPS},
            exactness=exactness,
            timings={"unit": "microseconds a run, 1 thread, by batch x time", **timings},
            provenance=_provenance(request, graph),
        )
        content = model.content(document)
        folder = artifacts.write(request.artifacts, request.name, request.version, {MODEL_NAME: content})
    adopted.show(console, str(folder), document, roles, constants, request.contexts, len(content))
    return folder


class _Model:
    """The graph, edited so that it takes `[batch, time, ...]`, and what runs of it have told."""

    def __init__(self, graph: ForeignGraph, roles: Roles, contexts: Mapping[str, int]) -> None:
        self.graph = graph
        self._shapes: dict[str, tuple[int | str, ...]] = {}
        contexts_of = [_with_context(graph, roles, name, size) for name, size in contexts.items()]
        for role in roles.inputs:
            if role.batch_axis is None:
                graph.add_batch_axis(role.port.name, True)
            elif role.order is not None:
                graph.turn_input(role.port.name, role.order)
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
        self._outputs = [port.name for port in graph.outputs if port.name not in following]
        if not self._outputs:
            raise ExportError("all of its outputs are next states: there is none to answer with")
        self._look_at_outputs(any(role.order is not None and role.time_axis == 0 for role in roles.inputs),
                              all(role.batch_axis is None for role in roles.inputs))  # fmt: skip

    @property
    def signature(self) -> Signature:
        """As it is before anything is proved."""
        return self._signature

    def content(self, document: ModelDocument | None) -> bytes:
        """Gives the file."""
        return self.graph.finished(self._shapes, document)

    def open(self, signature: Signature) -> Runtime:
        """Opens it as it will be served."""
        unproved = Exactness(proved=False, why="not proved yet")
        document = ModelDocument(name="adopted", signature=signature, exactness=unproved)
        try:
            return Runtime(self.content(document))
        except RuntimeUnavailable as error:
            raise ExportError(str(error)) from None

    def _look_at_outputs(self, time_first: bool, alone: bool) -> None:
        """Runs the graph to see the shapes of its outputs, and turns those that are in another order of axes."""
        told = self._signature
        self._shapes = self._input_shapes()
        if alone:
            for name in self._outputs:
                self.graph.add_batch_axis(name, False)
        try:
            ran = self._probe(told.batch or 2, 3)
        except ExportError as refused:
            if told.batch is not None:
                raise
            try:  # The graph says that it takes any number of rows, and may take one only.
                ran = self._probe(1, 3)
            except ExportError:
                raise refused from None
            told = self._signature = told.model_copy(update={"batch": 1})
            self._shapes = self._input_shapes()
        if time_first and told.time_axis:
            for name in self._outputs:
                if ran[name].ndim >= 2:
                    self.graph.turn_output(name, (1, 0, *range(2, ran[name].ndim)))
            ran = self._probe(told.batch or 2, 3)
        longer = self._probe(told.batch or 2, 5) if told.time_axis else ran
        outputs = []
        for name in self._outputs:
            shape, again = ran[name].shape, longer[name].shape
            rows = told.batch or 2
            leading = (rows, 3) if told.time_axis else (rows,)
            if shape[: len(leading)] != leading or (told.time_axis and again != (rows, 5, *shape[2:])):
                of = f"{rows} rows of 3 time steps" if told.time_axis else f"{rows} rows"
                wanted = "[batch, time, ...]" if told.time_axis else "[batch, ...]"
                raise ExportError(
                    f"output {name} has shape {list(shape)} for {of}, where {wanted} is wanted: "
                    f"{self._hint() if told.time_axis else 'give the axis of the batch with --input NAME:batch_axis=N'}"
                )
            if str(ran[name].dtype) not in SERVED_TYPES:
                raise ExportError(f"output {name} is {ran[name].dtype}: {', '.join(SERVED_TYPES)} can be served")
            outputs.append(TensorSpec(name=name, dtype=str(ran[name].dtype), shape=shape[len(leading) :]))
        for spec in told.states:
            shape, wanted_shape = ran[spec.next_name].shape, self._state_shape(spec, told.batch or 2)
            if shape != wanted_shape:
                raise ExportError(
                    f"state {spec.name} is {list(wanted_shape)} and its next one, {spec.next_name}, {list(shape)}: "
                    f"it cannot be fed back, give another with --state {spec.name}=OUTPUT[:batch_axis=N]"
                )
        self._signature = told.model_copy(update={"outputs": tuple(outputs)})
        leads = [self._batch_name(), "time"] if told.time_axis else [self._batch_name()]
        self._shapes |= {spec.name: (*leads, *spec.shape) for spec in outputs}
        self._shapes |= {spec.next_name: self._state_shape(spec, self._batch_name()) for spec in told.states}

    def _hint(self) -> str:
        dims = [dim for port in self.graph.inputs for dim in port.dims or () if isinstance(dim, str)]
        return f"where an axis is none of time, fix its size with --dim NAME=VALUE (of {', '.join(sorted(set(dims)))})"

    def _probe(self, rows: int, time: int) -> dict[str, Any]:
        told = self._signature
        x, states = draw(told, rows, time, np.random.default_rng(0))
        feeds = {
            spec.name: np.ascontiguousarray(part if told.time_axis else part[:, 0])
            for spec, part in zip(told.inputs, parts(x), strict=True)
        }
        feeds |= {spec.name: state for spec, state in zip(told.states, states, strict=True)}
        session = adopted.opened(self.content(None))
        names = [port.name for port in self.graph.outputs]
        try:
            return dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:
            steps = f" of {time} time steps" if told.time_axis else ""
            hint = f": {self._hint()}" if told.time_axis else ""
            raise ExportError(f"it does not run on {rows} rows{steps}, {adopted.first_line(error)}{hint}") from None

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


def _input_spec(graph: ForeignGraph, role: Any, context: int) -> TensorSpec:
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


def _proved(model: _Model) -> tuple[Signature, Exactness]:
    """Finds how the model can be served so that its bits are always the same, and says what was proved."""
    told = model.signature
    effort = _effort(model.open(told))
    alone = told.model_copy(update={"batch": told.batch or 1})
    differed: Differs | None = None
    for signature in (told, alone):
        try:
            why = compare([model.open(signature)], effort)
            if signature is not told:
                why += f"; each row in a run of its own, since together {differed}"
            return signature, Exactness(proved=True, why=why)
        except Differs as differs:
            differed = differs
    assert differed is not None
    if differed.difference <= _ROUNDING:
        return told, Exactness(proved=False, why=f"{differed}: it is run one row and one time step at a time")
    if not told.time_axis:
        raise ExportError(f"its numbers are not its rows' own, are some random? {differed}: it cannot be served")
    return _whole_only(model, alone, effort, differed)


def _whole_only(model: _Model, alone: Signature, effort: Effort, differed: Differs) -> tuple[Signature, Exactness]:
    why = f"run in chunks it gives other numbers than in one run (by {differed.difference:.1e}): it looks beyond a step"
    for batch in (model.signature.batch, alone.batch):
        signature = alone.model_copy(update={"batch": batch, "predict_only": why})
        try:
            return signature, Exactness(proved=True, why=compare([model.open(signature)], effort))
        except Differs as differs:
            differed = differs
    return signature, Exactness(proved=False, why=str(differed))


def _effort(runtime: Runtime) -> Effort:
    rows = 64 if runtime.signature.batch is None else 1
    each = runtime.seconds(rows, 1) / rows
    steps = WHOLE.time * (sum(WHOLE.batches) + max(WHOLE.batches)) + 4 * WHOLE.long * 5
    return WHOLE if each * steps < _PATIENCE else SHORT


def _provenance(request: Request, graph: ForeignGraph) -> dict[str, str]:
    told = graph.model
    flags = {
        "constants": ", ".join(f"{name}={text}" for name, text in request.constants.items()),
        "dims": ", ".join(f"{name}={size}" for name, size in request.dims.items()),
        "context": ", ".join(f"{name}={size}" for name, size in request.contexts.items()),
        "producer": f"{told.producer_name} {told.producer_version}".strip(),
    }
    return {
        "source": request.model.name,
        "source_sha256": hashlib.sha256(request.model.read_bytes()).hexdigest(),
        "adopted": datetime.now(UTC).isoformat(timespec="seconds"),
        "opset": str(graph.opset),
        **{name: text for name, text in flags.items() if text},
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
