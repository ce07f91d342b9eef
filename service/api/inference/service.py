"""Inference as the protocol has it, whatever carries it: whole sequences, or steps of a sequence kept as a session.

Triton's sequence extension says which requests belong together; docs/inference-protocol.md says what it leaves open.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_sequence.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from cellserve.models.signature import TensorSpec
from cellserve.service.api.inference import metadata
from cellserve.service.api.inference.errors import NotReady, SequenceNotStarted
from cellserve.service.api.inference.statistics import Statistics
from cellserve.service.api.inference.tensors import DATATYPES, check_datatype
from cellserve.service.context import ServiceContext
from cellserve.service.engine.engine import Engine
from cellserve.service.engine.sequences import run_sequences
from cellserve.service.errors import (
    BodyTooLarge,
    Conflict,
    InvalidInput,
    SessionExists,
    SessionGone,
    UnknownSession,
)
from cellserve.service.idempotency import creation, step_request
from cellserve.service.model_repository.repository import Model
from cellserve.service.runtime.tensor_layout import Layout, parts
from cellserve.service.sessions.session import Session
from cellserve.service.validation.tensor_values import checked

Array = NDArray[Any]

_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
_LARGEST_NUMBER = 2**64 - 1


class Sequence(NamedTuple):
    """What a request's parameters say of the sequence that it belongs to."""

    given: int | str  # as the client sends it
    id: str  # the same as text
    start: bool
    end: bool
    position: int | None


class Inputs(NamedTuple):
    """A request's inputs, as a version of the model takes them."""

    name: str  # of the first one
    x: Array  # [batch, time, *features]
    single: bool  # whether it had no time axis
    lengths: Array | None  # [batch]

    def check_alone(self) -> None:
        """Raises InvalidInput where there is more than a sequence takes at a time."""
        if len(self.x) != 1 or self.lengths is not None:
            raise InvalidInput(
                f"{self.name}: the request has a batch of {len(self.x)}"
                f"{' with lengths' if self.lengths is not None else ''}: a request of a sequence has a batch of 1",
                place=self.name,
            )


class InferenceResult(NamedTuple):
    """What came out: by name the outputs, each with the axes that the input had, and the answer's parameters."""

    outputs: dict[str, Array]
    batch: int
    parameters: dict[str, Any]
    model: Model  # the version that it ran on


class Inference:
    """Answers inference requests, and knows what there is to say about models.

    Args:
        service: Holds the models and the sessions.
    """

    def __init__(self, service: ServiceContext) -> None:
        self.service = service
        self._statistics: WeakKeyDictionary[Engine, Statistics] = WeakKeyDictionary()

    async def engine(self, name: str, version: str = "") -> Engine:
        """Gives the engine of a model's newest version or of that one, which may have to be loaded.

        Raises:
            UnknownModel: There is no such model or version, or it is refused.
            ServerFull: As many old versions are loaded as may be.
        """
        return await self.service.engine_when_loaded(f"{name}:{version}" if version else name)

    def versions(self, name: str) -> list[str]:
        """Gives the versions of a model that can be asked for, the newest first."""
        states = self.service.versions.states().get(name, ())
        return [str(one.key.version) for one in states if one.state in ("serving", "draining", "loaded", "available")]

    def statistics(self, engine: Engine) -> Statistics:
        """Gives the counts of a model's requests."""
        found = self._statistics.get(engine)
        if found is None:
            found = self._statistics[engine] = Statistics(engine)
        return found

    async def statistics_document(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Gives the statistics of a model, of all that are loaded without a name; raises as `engine` does."""
        engines = [await self.engine(name, version)] if name else self.service.versions.loaded.values()
        return {"model_stats": [self.statistics(engine).document() for engine in engines]}

    def config(self, engine: Engine) -> dict[str, Any]:
        """Gives a model's configuration."""
        return metadata.config(engine, self.service.settings.session_idle_seconds)

    def check_ready(self) -> None:
        """Raises NotReady where the server takes no requests yet, or no more."""
        if not self.service.ready:
            raise NotReady("the server is starting or stopping: try again in a second")

    async def infer(
        self,
        owner: str,
        engine: Engine,
        tensors: Mapping[str, Array],
        parameters: Mapping[str, Any],
        any_version: bool = False,
    ) -> InferenceResult:
        """Runs whole sequences, or steps the sequence that the parameters name.

        Args:
            owner: Whose request it is.
            engine: Of the model.
            tensors: The model's inputs, `[batch, time, *features]`, or `[batch, *features]` for one time step; and, for
                whole sequences, `lengths [batch]`.
            any_version: Whether no version was asked for: a sequence stays on the one that it was started on.
            parameters: `sequence_id`, `sequence_start`, `sequence_end`, `position`; others are not looked at.

        Raises:
            InvalidInput: A tensor or a parameter does not fit.
            SequenceNotStarted: A step of a sequence that was never started.
            SessionGone: The sequence has ended or expired.
            SessionExists, PositionConflict, SessionWentBack, StepInFlight, NotFinite, QueueFull: As a session's step.
        """
        sequence = _sequence(parameters)
        inputs = _inputs(engine.model, tensors)
        told: dict[str, Any] = {}
        if sequence is None:
            y = await self._whole(engine, inputs)
        else:
            engine.model.check_steppable()
            inputs.check_alone()
            session, inputs = await self._session(owner, engine, sequence, inputs, tensors if any_version else None)
            y, told = await self._step(session, sequence, inputs.x[0])
            y, engine = y[None], session.engine
        outputs = dict(zip(_names(engine.model.outputs), parts(y[:, 0] if inputs.single else y), strict=True))
        return InferenceResult(outputs, len(inputs.x), told, engine.model)

    async def _whole(self, engine: Engine, inputs: Inputs) -> Array:
        """Runs whole sequences from zeros; gives y `[batch, time, *outputs]`, zeros past a row's length."""
        x, lengths = inputs.x, inputs.lengths
        limit = self.service.settings.max_sequences
        if len(x) > limit:
            raise BodyTooLarge(f"the batch is {len(x)}, a request takes {limit}: send it in parts", limit=limit)
        rows = list(x) if lengths is None else [x[row, :length] for row, length in enumerate(lengths)]
        outputs, _ = await run_sequences(engine, rows, None, True, False, _names(engine.model.inputs)[0])
        if len(outputs) == 1 and lengths is None:
            return outputs[0][None]
        # A model that cannot be stepped may give another number of outputs than it takes time steps.
        time = max(map(len, outputs)) if engine.whole is not None else x.shape[1]
        y = engine.model.outputs.zeros(len(x), time)
        for row, output in enumerate(outputs):
            y[row, : len(output)] = output
        return y

    async def _session(
        self, owner: str, engine: Engine, sequence: Sequence, inputs: Inputs, again: Mapping[str, Array] | None
    ) -> tuple[Session, Inputs]:
        """Gives a sequence's session, and the inputs as its version of the model takes them.

        Args:
            owner: Whose it is.
            engine: Of the version that it starts on, or must be on.
            sequence: The sequence.
            inputs: As that version takes them.
            again: The tensors, to be read anew where the session is on another version and may be.
        """
        store, name = self.service.sessions, engine.model.name
        session_id = _session_id(name, sequence)
        try:
            if not sequence.start:
                session = await store.find(owner, session_id)
            elif sequence.position is None:
                session = await store.recreate(engine, owner, session_id, creation(name, None))
            else:
                session, _ = await store.create(engine, None, owner, session_id, creation(name, None))
        except SessionGone as gone:
            raise _over(name, sequence, gone) from None
        except UnknownSession:
            raise _not_started(name, sequence) from None
        if session.engine is engine:
            return session, inputs
        same = session.model.name == name and _names(session.model.outputs) == _names(engine.model.outputs)
        if again is not None and same:
            return session, _inputs(session.model, again)
        raise SessionExists(
            f"session {session_id!r} is of model {session.model.name!r}, version {session.model.version}: "
            f"ask that version, or choose another sequence_id",
            position=session.position,
        )

    async def _step(self, session: Session, sequence: Sequence, x: Array) -> tuple[Array, dict[str, Any]]:
        store, name = self.service.sessions, session.model.name
        once = None if sequence.position is None else step_request(sequence.position, x, True)
        try:
            stepped = await self.service.writer.submit(session, x, True, once)
        except SessionGone as gone:
            raise _over(name, sequence, gone) from None
        except UnknownSession:
            raise _not_started(name, sequence) from None
        if sequence.end:
            # Not where another request has moved it, ended it or begun it anew meanwhile.
            with suppress(Conflict, SessionGone, UnknownSession):
                await store.delete(session.owner, session.id, stepped.position)
        told: dict[str, Any] = {
            "sequence_id": sequence.given,
            "sequence_start": sequence.start,
            "sequence_end": sequence.end,
            "session": session.id,
            "position": stepped.position,
            "durable": store.durable,
        }
        if once is not None:
            told["replayed"] = stepped.replayed
        return stepped.y, told


def _session_id(model: str, sequence: Sequence) -> str:
    # In Triton each model has its sequences for itself. No model's name has a ~ in it.
    return f"{model}~{sequence.id}"


def _not_started(model: str, sequence: Sequence) -> SequenceNotStarted:
    return SequenceNotStarted(
        f"sequence {sequence.id!r} of model {model!r} is not known: send sequence_start with its first request"
    )


def _over(model: str, sequence: Sequence, gone: SessionGone) -> SessionGone:
    """Says of a sequence, in the protocol's words, that it is there no more."""
    reason, position = gone.extensions["reason"], gone.extensions["position"]
    what = {"expired": "expired", "evicted": "was evicted to make room"}.get(reason, "was ended")
    advice = "start it again with sequence_start"
    if sequence.position is not None:
        advice = "start one of another sequence_id, or this one again without position"
    return SessionGone(
        f"sequence {sequence.id!r} of model {model!r} {what} at position {position}: {advice}", **gone.extensions
    )


def _sequence(parameters: Mapping[str, Any]) -> Sequence | None:
    """Reads what the parameters say of a sequence; None where the request belongs to none."""
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
                "sequence_id: missing: sequence_start, sequence_end and position are of a sequence", place="sequence_id"
            )
        return None
    name = str(given)
    if not _ID.fullmatch(name):
        raise InvalidInput(
            f"sequence_id: {name[:80]!r} cannot be one: send an integer, or 1 to 128 letters, digits, or of -._~",
            place="sequence_id",
        )
    if start and position:
        raise InvalidInput("position: a sequence starts at 0: send that with sequence_start", place="position")
    return Sequence(given, name, start, end, position)


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name}: send true or false", place=name)
    return value


def _names(layout: Layout) -> list[str]:
    return [spec.name for spec in layout.specs]


def _inputs(model: Model, tensors: Mapping[str, Array]) -> Inputs:
    """Reads a model's inputs, or raises InvalidInput where one is missing or does not fit."""
    names, optional = _names(model.inputs), model.document.signature.lengths
    known = {*names, *([optional] if optional else [])}
    if set(names) - tensors.keys() or tensors.keys() - known:
        raise InvalidInput(
            f"inputs: there are {sorted(tensors)}: send {', '.join(names)}, and lengths where rows are padded",
            place="inputs",
        )
    for spec in model.inputs.specs:
        _check(spec, tensors[spec.name])
    leading = {spec.name: _leading(spec, tensors[spec.name]) for spec in model.inputs.specs}
    if len(set(leading.values())) > 1:
        raise InvalidInput(f"inputs: their batch and time differ: {leading}: send the same of each", place="inputs")
    x = model.inputs.join([tensors[name] for name in names])
    single = len(leading[names[0]]) == 1
    if single:
        x = x[:, None]
    lengths = tensors.get(optional) if optional else None
    if lengths is not None:
        if lengths.dtype != np.int32 or lengths.shape not in ((len(x),), (len(x), 1)):
            raise InvalidInput(f"lengths: send INT32 of shape [{len(x)}], one a row", place="lengths")
        if (lengths < 1).any() or (lengths > x.shape[1]).any():
            raise InvalidInput(f"lengths: each is to be from 1 to {x.shape[1]}, the time steps sent", place="lengths")
        lengths = lengths.ravel()
    return Inputs(names[0], x, single, lengths)


def _leading(spec: TensorSpec, x: Array) -> tuple[int, ...]:
    """Gives a tensor's batch and, where it has that axis, its time."""
    return x.shape[: x.ndim - len(spec.shape)]


def _check(spec: TensorSpec, x: Array) -> None:
    """Checks the model's input, or raises InvalidInput."""
    check_datatype(spec.name, DATATYPES[x.dtype.name], [spec])  # again: a sequence may be of an older version
    axes = len(spec.shape)
    if x.ndim not in (1 + axes, 2 + axes) or x.shape[x.ndim - axes :] != spec.shape or not x.size:
        features = ", ".join(map(str, spec.shape))
        raise InvalidInput(
            f"{spec.name}: its shape is {list(x.shape)}: send [batch, time, {features}], "
            f"or for one time step [batch, {features}]",
            place=spec.name,
        )
    checked(x, spec, spec.name)
