"""Inference as the protocol has it, whatever carries it: whole sequences, or steps of a sequence kept as a session.

Triton's sequence extension says which requests belong together; docs/inference-protocol.md says what it leaves open.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_sequence.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.signature import TensorSpec
from service.api.inference import describe
from service.api.inference.errors import NotReady, SequenceNotStarted
from service.api.inference.statistics import Statistics
from service.api.inference.tensors import DATATYPES
from service.api.predict import run_sequences
from service.engine import Engine
from service.errors import (
    BodyTooLarge,
    Conflict,
    InvalidInput,
    SessionExists,
    SessionGone,
    UnknownModel,
    UnknownSession,
)
from service.exactly_once import creation, step_request
from service.service import Service
from service.sessions import Session

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


class Inferred(NamedTuple):
    """What came out: by name the outputs, each with the axes that the input had, and the answer's parameters."""

    outputs: dict[str, Array]
    batch: int
    parameters: dict[str, Any]


class Inference:
    """Answers inference requests, and knows what there is to say about models.

    Args:
        service: Holds the models and the sessions.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._statistics: dict[Engine, Statistics] = {}

    def engine(self, name: str, version: str = "") -> Engine:
        """Gives the engine of a model, raises UnknownModel where that model or version is not served."""
        engine = self.service.engine(name)
        if version and version != str(engine.model.version):
            raise UnknownModel(
                f"model {name!r} is served in version {engine.model.version}, not in {version[:20]!r}: "
                f"send that one, or none"
            )
        return engine

    def statistics(self, engine: Engine) -> Statistics:
        """Gives the counts of a model's requests."""
        found = self._statistics.get(engine)
        if found is None:
            found = self._statistics[engine] = Statistics(engine)
        return found

    def told_statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Gives the statistics of a model, of all without a name; raises UnknownModel."""
        engines = [self.engine(name, version)] if name else self.service.engines.values()
        return {"model_stats": [self.statistics(engine).document() for engine in engines]}

    def config(self, engine: Engine) -> dict[str, Any]:
        """Gives a model's configuration."""
        return describe.config(engine, self.service.settings.session_idle_seconds)

    def check_ready(self) -> None:
        """Raises NotReady where the server takes no requests yet, or no more."""
        if not self.service.ready:
            raise NotReady("the server is starting or stopping: try again in a second")

    async def infer(
        self, owner: str, engine: Engine, tensors: Mapping[str, Array], parameters: Mapping[str, Any]
    ) -> Inferred:
        """Runs whole sequences, or steps the sequence that the parameters name.

        Args:
            owner: Whose request it is.
            engine: Of the model.
            tensors: The model's input, `[batch, time, *features]`, or `[batch, *features]` for one time step; and, for
                whole sequences, `lengths [batch]`.
            parameters: `sequence_id`, `sequence_start`, `sequence_end`, `position`; others are not looked at.

        Raises:
            InvalidInput: A tensor or a parameter does not fit.
            SequenceNotStarted: A step of a sequence that was never started.
            SessionGone: The sequence has ended or expired.
            SessionExists, PositionConflict, SessionWentBack, StepInFlight, NotFinite, QueueFull: As a session's step.
        """
        sequence = _sequence(parameters)
        signature = engine.model.document.signature
        x, single, lengths = self._inputs(engine, tensors)
        if sequence is None:
            y = await self._whole(engine, x, lengths)
            told: dict[str, Any] = {}
        elif signature.predict_only:
            raise InvalidInput(
                f"sequence_id: model {engine.model.name!r} cannot be stepped ({signature.predict_only}): leave it out",
                place="sequence_id",
            )
        else:
            if len(x) != 1 or lengths is not None:
                raise InvalidInput(
                    f"{engine.model.reader.spec.name}: the request has a batch of {len(x)}"
                    f"{' with lengths' if lengths is not None else ''}: a request of a sequence has a batch of 1",
                    place=engine.model.reader.spec.name,
                )
            y, told = await self._step(owner, engine, sequence, x[0])
            y = y[None]
        return Inferred({signature.outputs[0].name: y[:, 0] if single else y}, len(x), told)

    def _inputs(self, engine: Engine, tensors: Mapping[str, Array]) -> tuple[Array, bool, Array | None]:
        """Gives x `[batch, time, *features]`, whether it had no time axis, and the lengths where there are any."""
        signature = engine.model.document.signature
        spec = engine.model.reader.spec
        known = {spec.name, *([signature.lengths] if signature.lengths else [])}
        if spec.name not in tensors or tensors.keys() - known:
            raise InvalidInput(
                f"inputs: there are {sorted(tensors)}: send {spec.name}, and lengths where rows are padded",
                place="inputs",
            )
        x = tensors[spec.name]
        _check(spec, x)
        single = x.ndim == 1 + len(spec.shape)
        if single:
            x = x[:, None]
        lengths = tensors.get(signature.lengths) if signature.lengths else None
        if lengths is None:
            return x, single, None
        if lengths.dtype != np.int32 or lengths.shape not in ((len(x),), (len(x), 1)):
            raise InvalidInput(f"lengths: send INT32 of shape [{len(x)}], one a row", place="lengths")
        if (lengths < 1).any() or (lengths > x.shape[1]).any():
            raise InvalidInput(f"lengths: each is to be from 1 to {x.shape[1]}, the time steps sent", place="lengths")
        return x, single, lengths.ravel()

    async def _whole(self, engine: Engine, x: Array, lengths: Array | None) -> Array:
        """Runs whole sequences from zeros; gives y `[batch, time, *outputs]`, zeros past a row's length."""
        limit = self.service.settings.max_sequences
        if len(x) > limit:
            raise BodyTooLarge(f"the batch is {len(x)}, a request takes {limit}: send it in parts", limit=limit)
        rows = list(x) if lengths is None else [x[row, :length] for row, length in enumerate(lengths)]
        outputs, _ = await run_sequences(engine, rows, None, True, False, engine.model.reader.spec.name)
        if len(outputs) == 1 and lengths is None:
            return outputs[0][None]
        y = np.zeros((*x.shape[:2], *engine.model.output_shape), outputs[0].dtype)
        for row, output in enumerate(outputs):
            y[row, : len(output)] = output
        return y

    async def _step(self, owner: str, engine: Engine, sequence: Sequence, x: Array) -> tuple[Array, dict[str, Any]]:
        table, name = self.service.sessions, engine.model.name
        # In Triton each model has its sequences for itself. No model's name has a ~ in it.
        session_id = f"{name}~{sequence.id}"
        once = None if sequence.position is None else step_request(sequence.position, x, True)
        try:
            session = await self._session(owner, engine, sequence, session_id)
            if session.engine is not engine:
                raise SessionExists(
                    f"session {session_id!r} is of model {session.model.name!r}, version {session.model.version}: "
                    f"choose another sequence_id",
                    position=session.position,
                )
            stepped = await self.service.changes.step(session, x, True, once)
        except SessionGone as gone:
            raise _over(name, sequence, gone) from None
        except UnknownSession:
            raise SequenceNotStarted(
                f"sequence {sequence.id!r} of model {name!r} is not known: send sequence_start with its first request"
            ) from None
        if sequence.end:
            # Not where another request has moved it, ended it or begun it anew meanwhile.
            with suppress(Conflict, SessionGone, UnknownSession):
                await table.delete(owner, session_id, stepped.position)
        told: dict[str, Any] = {
            "sequence_id": sequence.given,
            "sequence_start": sequence.start,
            "sequence_end": sequence.end,
            "session": session_id,
            "position": stepped.position,
            "durable": table.durable,
        }
        if once is not None:
            told["replayed"] = stepped.replayed
        return stepped.y, told

    async def _session(self, owner: str, engine: Engine, sequence: Sequence, session_id: str) -> Session:
        table = self.service.sessions
        if not sequence.start:
            return await table.find(owner, session_id)
        origin = creation(engine.model.name, None)
        if sequence.position is None:
            return await table.begin_anew(engine, owner, session_id, origin)
        session, _ = await table.make(engine, None, owner, session_id, origin)
        return session


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


def _check(spec: TensorSpec, x: Array) -> None:
    """Checks the model's input, or raises InvalidInput."""
    if x.dtype != spec.dtype:
        raise InvalidInput(
            f"{spec.name}: its datatype is {DATATYPES[x.dtype.name]}: send {DATATYPES[spec.dtype]}", place=spec.name
        )
    axes = len(spec.shape)
    if x.ndim not in (1 + axes, 2 + axes) or x.shape[x.ndim - axes :] != spec.shape or not x.size:
        features = ", ".join(map(str, spec.shape))
        raise InvalidInput(
            f"{spec.name}: its shape is {list(x.shape)}: send [batch, time, {features}], "
            f"or for one time step [batch, {features}]",
            place=spec.name,
        )
    if x.dtype.kind == "f":
        if not np.isfinite(x).all():
            where = "".join(f"[{number}]" for number in np.argwhere(~np.isfinite(x))[0])
            raise InvalidInput(
                f"{spec.name}{where}: not a finite number that float32 can hold", place=f"{spec.name}{where}"
            )
    elif spec.bounds is not None and not (spec.bounds[0] <= x.min() and x.max() <= spec.bounds[1]):
        raise InvalidInput(f"{spec.name}: send integers from {spec.bounds[0]} to {spec.bounds[1]}", place=spec.name)
