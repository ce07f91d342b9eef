"""JSON of steps and sessions, shared by the surfaces: step requests to arrays, results to answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cellserve.service.idempotency import IdempotencyKey, step_key
from cellserve.service.model_repository.model import Model
from cellserve.service.runtime.tensor_layout import unpack
from cellserve.service.sessions.session import Session, time_text
from cellserve.service.sessions.stores.protocol import SessionStore
from cellserve.service.validation.json_bodies import StepRequest

Array = NDArray[Any]


_simple_step_decoder = msgspec.json.Decoder(StepRequest[list[float] | int])

# Raised for a body that is not of the simple form.
NOT_SIMPLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def parse_simple_step(model: Model, body: bytes) -> tuple[Array | None, IdempotencyKey | None]:
    """Parses the most common step request, one time step of plain numbers, in one pass.

    Returns:
        x `[1, *features]` and the idempotency key, if the request has a position. x is None where the request is not
        of this simple form: `read_step` reads all forms.

    Raises:
        NOT_SIMPLE: The body is not such a request; `read_step` says why.
    """
    plain = _simple_step_decoder.decode(body)
    x = model.reader.decode_one_step(plain.x)
    return x, None if x is None or plain.position is None else step_key(plain.position, x, True)


def wants_all_outputs(session: Session, outputs: str | None) -> bool:
    """Whether the outputs of all time steps are requested; `outputs` is `last`, `all` or None, the model's default."""
    return (outputs or session.model.document.signature.default_output) == "all"


def step_json(
    store: SessionStore, session: Session, y: Array, position: int, single: bool, every_output: bool
) -> dict[str, Any]:
    """Returns the answer to a step with the outputs y `[time, *outputs]`, as JSON."""
    output = y if every_output and not single else y[-1]
    model = session.model
    answer: dict[str, Any] = {"session": session.id, "position": position, "y": model.outputs.to_json(output)}
    names = model.document.labels
    if names is not None:
        answer["label" if output.ndim == y.ndim - 1 else "labels"] = labels_of(names, output)
    answer["durable"] = store.durable
    return answer


def session_json(store: SessionStore, session: Session, position: int | None = None) -> dict[str, Any]:
    """Returns what every answer about a session contains; `position` defaults to the session's own."""
    return {
        "session": session.id,
        "model": session.model.name,
        "version": session.model.version,
        "position": session.position if position is None else position,
        "created_at": time_text(session.created_at),
        "expires_in": store.table.idle_seconds,
        "durable": store.durable,
    }


def labels_of(names: Sequence[str], y: Array) -> Any:
    """Returns the name of the largest entry of the (first) output y `[n]`, or nested lists of those of y `[..., n]`."""
    return _named(names, np.argmax(unpack(y)[0], axis=-1).tolist())


def _named(names: Sequence[str], places: Any) -> Any:
    return names[places] if isinstance(places, int) else [_named(names, one) for one in places]
