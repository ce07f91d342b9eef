"""`POST /sessions/{id}/rollout`: autoregressive generation, answered at once or as server-sent events."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from cellserve.service.api.answer_size import check_json_answer
from cellserve.service.api.asgi import REPLAY, RESUMABLE, as_problem, cancel_on_disconnect, read_json_body
from cellserve.service.api.json_parts import send_sized_json
from cellserve.service.context import ServiceContext
from cellserve.service.errors import CannotRollOut, InvalidInput, ShuttingDown
from cellserve.service.model_repository.model import Model
from cellserve.service.observability.request_context import problem_body
from cellserve.service.sessions.rollout import GeneratedStep, Rollout
from cellserve.service.sessions.sampling import Sampling
from cellserve.service.sessions.session import Session, current_client
from cellserve.service.validation.json_bodies import read_rollout

Array = NDArray[Any]

EVENTS = b"text/event-stream"


class RolloutEndpoint:
    """The endpoint, plain ASGI: FastAPI's streaming responses lack the back-pressure that it needs.

    Args:
        service: The service.
    """

    def __init__(self, service: ServiceContext) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        owner = self.service.owner(scope["headers"], scope["client"])
        body = await read_json_body(scope, receive, self.service.settings.max_body_bytes)
        session = await self.service.sessions.fetch(owner, scope["path_params"]["session_id"])
        headers = dict(scope["headers"])
        accepts = EVENTS in headers.get(b"accept", b"")
        wanted, position = await self._read(current_client(owner), session.model, body, accepts)
        if wanted.streamed:
            after = _last_event_id(headers.get(b"last-event-id"), position)
            await cancel_on_disconnect(self._stream(scope, send, session, wanted, position, after, owner), receive)
            return
        size = check_json_answer(self.service.settings.max_exchange_bytes, session.model, (wanted.x,), wanted.steps)
        rolled = await cancel_on_disconnect(self.service.rollouts.run(session, wanted, position), receive)
        answer = {
            "session": session.id,
            "position": rolled.position,
            **_steps_json(session.model, rolled.generated),
            "durable": self.service.sessions.durable,
        }
        await send_sized_json(send, receive, answer, size, REPLAY if rolled.replayed else ())

    async def _read(self, client: str, model: Model, body: bytes, streamed: bool) -> tuple[Rollout, int | None]:
        if model.document.rollout is None:
            raise CannotRollOut(
                f"model {model.name!r} does not declare that its output can be its next input: send inputs to /step "
                f"(or export it with --rollout)"
            )
        letters = None if model.document.rollout == "value" else _letters(model)
        request, x = await self.service.decoding.read(client, read_rollout, model.reader, letters, body=body)
        limit = self.service.settings.max_rollout_steps
        if request.steps > limit:
            raise InvalidInput(
                f"steps: a request may have {limit}, got {request.steps}: send fewer, and continue from there",
                place="steps",
                limit=limit,
            )
        sampling = None
        if model.document.rollout != "value":
            temperature = 1.0 if request.temperature is None else request.temperature
            sampling = Sampling(temperature, request.top_k, request.seed or 0)
        else:
            for name in ("temperature", "top_k", "seed"):
                if getattr(request, name) is not None:
                    raise InvalidInput(f"{name}: leave it out: this model samples nothing", place=name)
        return Rollout(x, request.steps, sampling, request.stream or streamed), request.position

    async def _stream(
        self,
        scope: Scope,
        send: Send,
        session: Session,
        wanted: Rollout,
        position: int | None,
        after: int | None,
        owner: str,
    ) -> None:
        begun = False

        async def event(content: bytes, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                headers = [(b"content-type", EVENTS), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                begun = True
            await send({"type": "http.response.body", "body": content, "more_body": more})

        position_reached = after
        scope[RESUMABLE] = True
        try:
            async with (
                self.service.while_key_valid(scope["headers"], owner),
                aclosing(self.service.rollouts.stream(session, wanted, position, after)) as events,
            ):
                async for given in events:
                    position_reached = given.position
                    await event(b"id: %d\ndata: %b\n\n" % (position_reached, _data(session.model, given)))
                    if self.service.stopping:
                        raise ShuttingDown(
                            "the server is stopping: send the request again in a second, with the position that it "
                            "began at and Last-Event-ID"
                        )
        except Exception as error:
            if not begun:
                raise
            await event(b"event: problem\ndata: %b\n\n" % problem_body(as_problem(error, scope), scope), False)
            return
        end = {"session": session.id, "position": position_reached, "durable": self.service.sessions.durable}
        await event(b"event: end\ndata: %b\n\n" % orjson.dumps(end), False)


def _last_event_id(header: bytes | None, position: int | None) -> int | None:
    if not header:
        return None
    if not header.isdigit() or len(header) > 18:
        raise InvalidInput(
            f"Last-Event-ID: {header.decode('latin-1')[:80]!r} is not an event id: send the last event's id",
            place="Last-Event-ID",
        )
    if position is None:
        raise InvalidInput(
            "position: to resume a stream, send the whole request again with the position that it began at "
            "(the first event's id, minus the time steps of x)",
            place="position",
        )
    return int(header)


def _letters(model: Model) -> tuple[str, ...] | None:
    """Returns the symbols' labels if each is a single character, otherwise None."""
    labels = model.document.labels
    return labels if labels is not None and all(len(label) == 1 for label in labels) else None


def _first(model: Model) -> int:
    """Returns the smallest symbol."""
    bounds = model.runtime.signature.inputs[0].bounds
    return 0 if bounds is None else bounds[0]


def _steps_json(model: Model, given: list[GeneratedStep]) -> dict[str, Any]:
    """Returns generated steps as JSON: `y [steps, *features]`, or the symbols with their labels or text."""
    if model.document.rollout == "value":
        return {"y": np.stack([one.x for one in given])}
    symbols = [int(one.x) for one in given]
    answer: dict[str, Any] = {"symbols": symbols}
    if model.document.labels is not None:
        labels = [model.document.labels[symbol - _first(model)] for symbol in symbols]
        answer |= {"labels": labels} if _letters(model) is None else {"text": "".join(labels)}
    return answer


def _data(model: Model, given: GeneratedStep) -> bytes:
    """Returns the data of one event."""
    singular = {"y": "y", "symbols": "symbol", "labels": "label", "text": "text"}
    fields = {singular[name]: value[0] for name, value in _steps_json(model, [given]).items()}
    return orjson.dumps({"position": given.position, **fields}, option=orjson.OPT_SERIALIZE_NUMPY)
