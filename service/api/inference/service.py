"""Open Inference Protocol requests, over any transport: whole sequences, or steps of a sequence kept as a session.

Triton's sequence extension defines which requests belong together; docs/reference/inference-protocol.md, the rest.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_sequence.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import TensorSpec
from cellserve.service.api.answer_size import check_binary_answer, check_json_answer
from cellserve.service.api.inference import metadata
from cellserve.service.api.inference.errors import NotReady, SequenceNotStarted
from cellserve.service.api.inference.statistics import Statistics
from cellserve.service.api.inference.tensors import DATATYPES, check_datatype
from cellserve.service.context import ServiceContext
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import (
    BodyTooLarge,
    Conflict,
    InvalidInput,
    SessionExists,
    SessionGone,
    UnknownSession,
    excerpt,
    listed,
)
from cellserve.service.idempotency import creation_digest, hashed, step_key
from cellserve.service.model_repository.model import Model
from cellserve.service.runtime.tensor_layout import TensorLayout, unpack
from cellserve.service.sessions.session import Session, current_client
from cellserve.service.validation.tensor_values import validate

Array = NDArray[Any]

_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~-]{1,128}")  # clients resolve . and .. in paths
_LARGEST_NUMBER = 2**64 - 1


class Sequence(NamedTuple):
    """The sequence that a request belongs to, from its parameters."""

    given: int | str  # the id as the client sent it
    id: str  # the id as text
    start: bool
    end: bool
    position: int | None


class Inputs(NamedTuple):
    """A request's inputs, in the layout of a version of the model."""

    name: str  # the first input's name, for error messages
    x: Array  # [batch, time, *features]
    single: bool  # whether the request had no time axis
    lengths: Array | None  # [batch]

    def check_alone(self) -> None:
        """Raises InvalidInput unless the batch is 1, as a request of a sequence must have."""
        if len(self.x) != 1 or self.lengths is not None:
            raise InvalidInput(
                f"{self.name}: the batch is {len(self.x)}{' with lengths' if self.lengths is not None else ''}: "
                f"send a batch of 1 without lengths in requests of a sequence",
                place=self.name,
            )


class InferenceResult(NamedTuple):
    """The result of a request."""

    outputs: dict[str, Array]  # by name, with the input's batch and time axes
    batch: int
    parameters: dict[str, Any]  # the answer's parameters
    model: Model  # the version used
    size: int  # bytes of the answer, at most


class Inference:
    """Answers inference requests, and describes models.

    Args:
        service: The models and the sessions.
    """

    def __init__(self, service: ServiceContext) -> None:
        self.service = service
        self._statistics: WeakKeyDictionary[Engine, Statistics] = WeakKeyDictionary()

    async def engine(self, name: str, version: str = "") -> Engine:
        """Returns the engine of a model's newest or given version, after loading it if necessary.

        Raises:
            UnknownModel: There is no such model or version, or it is refused.
            ServerFull: Too many old versions are loaded.
        """
        return await self.service.engine_when_loaded(f"{name}:{version}" if version else name)

    def versions(self, name: str) -> list[str]:
        """Returns the available versions of a model, the newest first."""
        states = self.service.versions.states().get(name, ())
        return [str(one.key.version) for one in states if one.state in ("serving", "draining", "loaded", "available")]

    def statistics(self, engine: Engine) -> Statistics:
        """Returns the statistics of a model's requests."""
        found = self._statistics.get(engine)
        if found is None:
            found = self._statistics[engine] = Statistics(engine)
        return found

    async def statistics_document(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Returns the statistics of a model, or of all loaded ones without a name; raises as `engine` does."""
        engines = [await self.engine(name, version)] if name else self.service.versions.loaded.values()
        return {"model_stats": [self.statistics(engine).document() for engine in engines]}

    def config(self, engine: Engine) -> dict[str, Any]:
        """Returns a model's configuration."""
        return metadata.config(engine, self.service.settings.session_idle_seconds)

    def check_ready(self) -> None:
        """Raises NotReady while the server is starting or stopping."""
        if not self.service.ready:
            raise NotReady("the server is starting or stopping: try again in a second")

    async def infer(
        self,
        owner: str,
        engine: Engine,
        tensors: Mapping[str, Array],
        parameters: Mapping[str, Any],
        any_version: bool = False,
        as_json: bool = False,
    ) -> InferenceResult:
        """Runs whole sequences, or steps the sequence that the parameters name.

        Args:
            owner: The owner of the request.
            engine: The model's engine.
            tensors: The model's inputs, `[batch, time, *features]`, or `[batch, *features]` for one time step; and, for
                whole sequences, `lengths [batch]`.
            parameters: `sequence_id`, `sequence_start`, `sequence_end`, `position`; others are ignored.
            any_version: Whether the request names no version: then a sequence stays on the version it started on.
            as_json: Whether outputs are sent as JSON numbers.

        Raises:
            InvalidInput: A tensor or a parameter is invalid.
            BodyTooLarge: The request is too large, or its answer would be.
            SequenceNotStarted: The sequence was never started.
            SessionGone: The sequence has ended or expired.
            SessionExists, PositionConflict, SessionWentBack, StepInFlight, NotFinite, QueueFull: As a session's step.
        """
        sequence = _sequence(parameters)
        inputs = _inputs(engine.model, tensors)
        answer: dict[str, Any] = {}
        check = check_json_answer if as_json else check_binary_answer
        size = check(self.service.settings.max_exchange_bytes, engine.model, (inputs.x,), math.prod(inputs.x.shape[:2]))
        if sequence is None:
            y = await self._predict(current_client(owner), engine, inputs)
        else:
            engine.model.check_steppable()
            inputs.check_alone()
            session, inputs = await self._session(owner, engine, sequence, inputs, tensors if any_version else None)
            y, answer = await self._step(session, sequence, inputs.x[0])
            y, engine = y[None], session.engine
        outputs = dict(zip(_names(engine.model.outputs), unpack(y[:, 0] if inputs.single else y), strict=True))
        return InferenceResult(outputs, len(inputs.x), answer, engine.model, size)

    async def _predict(self, client: str, engine: Engine, inputs: Inputs) -> Array:
        """Runs whole sequences from zeros; returns y `[batch, time, *outputs]`, zeros past a row's length."""
        x, lengths = inputs.x, inputs.lengths
        limit = self.service.settings.max_sequences
        if len(x) > limit:
            raise BodyTooLarge(f"the batch is {len(x)}, a request may have {limit}: split it", limit=limit)
        rows = list(x) if lengths is None else [x[row, :length] for row, length in enumerate(lengths)]
        outputs, _ = await engine.sequences.run(rows, None, True, False, _names(engine.model.inputs)[0], client)
        if len(outputs) == 1 and lengths is None:
            return outputs[0][None]
        # A predict-only model may have another number of outputs than of time steps.
        predict_only = engine.model.document.signature.predict_only is not None
        time = max(map(len, outputs)) if predict_only else x.shape[1]
        y = engine.model.outputs.zeros(len(x), time)
        for row, output in enumerate(outputs):
            y[row, : len(output)] = output
        return y

    async def _session(
        self, owner: str, engine: Engine, sequence: Sequence, inputs: Inputs, tensors: Mapping[str, Array] | None
    ) -> tuple[Session, Inputs]:
        """Returns a sequence's session, and the inputs in the layout of its version of the model.

        Args:
            owner: The owner of the request.
            engine: The engine of the version that it starts on, or must be on.
            sequence: The sequence.
            inputs: The inputs in that version's layout.
            tensors: The tensors, to be read again if the session is on another version; None if that is an error.
        """
        store, name = self.service.sessions, engine.model.name
        session_id = _session_id(name, sequence)
        try:
            if not sequence.start:
                session = await store.fetch(owner, session_id)
            elif sequence.position is None:
                session = await store.recreate(engine, owner, session_id, creation_digest(name, None))
            else:
                session, _ = await store.create(engine, None, owner, session_id, creation_digest(name, None))
        except SessionGone as gone:
            raise _ended_error(name, sequence, gone) from None
        except UnknownSession:
            raise _not_started_error(name, sequence) from None
        if session.engine is engine:
            return session, inputs
        same = session.model.name == name and _names(session.model.outputs) == _names(engine.model.outputs)
        if tensors is not None and same:
            return session, _inputs(session.model, tensors)
        raise SessionExists(
            f"session {session_id!r} is of model {session.model.name!r}, version {session.model.version}: "
            f"ask that version, or choose another sequence_id",
            position=session.position,
        )

    async def _step(self, session: Session, sequence: Sequence, x: Array) -> tuple[Array, dict[str, Any]]:
        store, name = self.service.sessions, session.model.name
        position = sequence.position
        key = None if position is None else await hashed(x, partial(step_key, position, x, True))
        try:
            stepped = await self.service.writer.submit(session, x, True, key)
        except SessionGone as gone:
            raise _ended_error(name, sequence, gone) from None
        except UnknownSession:
            raise _not_started_error(name, sequence) from None
        if sequence.end:
            # Unless another request has stepped, ended or restarted it meanwhile.
            with suppress(Conflict, SessionGone, UnknownSession):
                await store.delete(session.owner, session.id, stepped.position)
        answer: dict[str, Any] = {
            "sequence_id": sequence.given,
            "sequence_start": sequence.start,
            "sequence_end": sequence.end,
            "session": session.id,
            "position": stepped.position,
            "durable": store.durable,
        }
        if key is not None:
            answer["replayed"] = stepped.replayed
        return stepped.y, answer


def _session_id(model: str, sequence: Sequence) -> str:
    # As in Triton, each model has its own sequence ids. No model's name contains a ~.
    return f"{model}~{sequence.id}"


def _not_started_error(model: str, sequence: Sequence) -> SequenceNotStarted:
    return SequenceNotStarted(
        f"sequence {sequence.id!r} of model {model!r} is unknown: send sequence_start with its first request"
    )


def _ended_error(model: str, sequence: Sequence, gone: SessionGone) -> SessionGone:
    """Returns the error for an ended sequence, in the protocol's terms."""
    reason, position = gone.extensions["reason"], gone.extensions["position"]
    what = {"expired": "expired", "evicted": "was evicted to make room"}.get(reason, "was ended")
    advice = "start it again with sequence_start"
    if sequence.position is not None:
        advice = "start one of another sequence_id, or this one again without position"
    return SessionGone(
        f"sequence {sequence.id!r} of model {model!r} {what} at position {position}: {advice}", **gone.extensions
    )


def _sequence(parameters: Mapping[str, Any]) -> Sequence | None:
    """Returns the sequence in a request's parameters; None if the request belongs to none."""
    given = parameters.get("sequence_id", 0)
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise InvalidInput("sequence_id: send an integer or a string", place="sequence_id")
    if isinstance(given, int) and not 0 <= given <= _LARGEST_NUMBER:
        raise InvalidInput(f"sequence_id: send an integer from 0 to {_LARGEST_NUMBER}", place="sequence_id")
    start, end = _flag(parameters, "sequence_start"), _flag(parameters, "sequence_end")
    position = parameters.get("position")
    if position is not None and (isinstance(position, bool) or not isinstance(position, int) or position < 0):
        raise InvalidInput("position: send the number of steps that the sequence has taken", place="position")
    if not given:
        if start or end or position is not None:
            raise InvalidInput(
                "sequence_id: missing: sequence_start, sequence_end and position need one", place="sequence_id"
            )
        return None
    name = str(given)
    if not _ID.fullmatch(name):
        raise InvalidInput(
            f"sequence_id: {excerpt(name)!r} is not allowed: send an integer, or 1 to 128 letters, digits or -._~",
            place="sequence_id",
        )
    if start and position:
        raise InvalidInput("position: a sequence starts at 0: send 0 with sequence_start", place="position")
    return Sequence(given, name, start, end, position)


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name}: send true or false", place=name)
    return value


def _names(layout: TensorLayout) -> list[str]:
    return [spec.name for spec in layout.specs]


def _inputs(model: Model, tensors: Mapping[str, Array]) -> Inputs:
    """Returns a model's inputs; raises InvalidInput if one is missing or invalid."""
    names, optional = _names(model.inputs), model.document.signature.lengths
    known = {*names, *([optional] if optional else [])}
    if set(names) - tensors.keys() or tensors.keys() - known:
        raise InvalidInput(
            f"inputs: got {listed(tensors)}: send {', '.join(names)}, and lengths if rows are padded",
            place="inputs",
        )
    for spec in model.inputs.specs:
        _check(spec, tensors[spec.name])
    leading = {spec.name: _leading(spec, tensors[spec.name]) for spec in model.inputs.specs}
    if len(set(leading.values())) > 1:
        raise InvalidInput(f"inputs: their batch and time differ: {leading}: send the same for each", place="inputs")
    x = model.inputs.pack([tensors[name] for name in names])
    single = len(leading[names[0]]) == 1
    if single:
        x = x[:, None]
    lengths = tensors.get(optional) if optional else None
    if lengths is not None:
        if lengths.dtype != np.int32 or lengths.shape not in ((len(x),), (len(x), 1)):
            raise InvalidInput(f"lengths: send INT32 of shape [{len(x)}], one per row", place="lengths")
        if (lengths < 1).any() or (lengths > x.shape[1]).any():
            raise InvalidInput(
                f"lengths: each must be from 1 to {x.shape[1]}, the number of time steps", place="lengths"
            )
        lengths = lengths.ravel()
    return Inputs(names[0], x, single, lengths)


def _leading(spec: TensorSpec, x: Array) -> tuple[int, ...]:
    """Returns a tensor's batch and, if it has that axis, time."""
    return x.shape[: x.ndim - len(spec.shape)]


def _check(spec: TensorSpec, x: Array) -> None:
    """Raises InvalidInput if an input is invalid."""
    check_datatype(spec.name, DATATYPES[x.dtype.name], [spec])  # again, since a sequence may be on an older version
    axes = len(spec.shape)
    if x.ndim not in (1 + axes, 2 + axes) or x.shape[x.ndim - axes :] != spec.shape or not x.size:
        features = ", ".join(map(str, spec.shape))
        raise InvalidInput(
            f"{spec.name}: its shape is {list(x.shape)}: send [batch, time, {features}], "
            f"or for one time step [batch, {features}]",
            place=spec.name,
        )
    validate(x, spec, spec.name)
