"""`/sessions`: create, step, read, reset and delete sessions."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response

from service.api.messages import Receive, Scope, Send, read_json_body, send_json
from service.api.predict import labelled
from service.service import Service
from service.sessions import Session
from service.tensors import decode


class CreateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions`."""

    model: str | None = None
    states: msgspec.Raw = msgspec.Raw(b"null")


class StepRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions/{id}/step`."""

    x: msgspec.Raw
    outputs: Literal["last", "all"] | None = None


_create_decoder = msgspec.json.Decoder(CreateRequest)
_step_decoder = msgspec.json.Decoder(StepRequest)


class Step:
    """`POST /sessions/{id}/step`, plain ASGI: it is one of the two that carry the load."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        table = self.service.sessions
        body = await read_json_body(scope, receive, self.service.settings.max_body_bytes)
        session = table.get(scope["path_params"]["session_id"])
        model = session.model
        request = decode(_step_decoder, body)
        x, single = model.reader.x(request.x)
        every_output = single or (request.outputs or model.document.signature.default_output) == "all"

        def applied() -> None:
            session.position += len(x)

        async with table.turn(session):
            y = await session.engine.submit(session.slot, x, every_output, applied)
            position = session.position
        output = y if every_output and not single else y[-1]
        answer: dict[str, Any] = {"session": session.id, "position": position, "y": output}
        names = labelled(model.document, [output])
        if names:
            answer["label" if output.ndim == y.ndim - 1 else "labels"] = names["labels"][0]
        await send_json(send, answer)


def router(service: Service) -> APIRouter:
    """Makes the routes of everything but the step."""
    routes = APIRouter(tags=["sessions"])
    table = service.sessions

    def told(session: Session) -> dict[str, Any]:
        return {
            "session": session.id,
            "model": session.model.name,
            "version": session.model.version,
            "position": session.position,
            "expires_in": table.idle_seconds,
        }

    @routes.post("/sessions", status_code=201, summary="Create a session")
    async def create(request: Request, response: Response) -> dict[str, Any]:
        body = await read_json_body(request.scope, request.receive, service.settings.max_body_bytes)
        wanted = decode(_create_decoder, body)
        engine = service.engine(wanted.model)
        states = None if bytes(wanted.states) == b"null" else engine.model.reader.state(wanted.states)
        session = table.create(engine, states)
        response.headers["location"] = f"/sessions/{session.id}"
        return told(session)

    @routes.get("/sessions/{session_id}", summary="Read where a session is")
    async def read(session_id: str) -> dict[str, Any]:
        return told(table.get(session_id))

    @routes.delete("/sessions/{session_id}", status_code=204, summary="Delete a session")
    async def delete(session_id: str) -> None:
        await table.delete(session_id)

    @routes.post("/sessions/{session_id}/reset", summary="Set a session's state to zeros")
    async def reset(session_id: str) -> dict[str, Any]:
        async with table.turn(table.get(session_id)) as session:
            session.engine.arena.write(session.slot, None)
            session.position += 1  # a reset is a change too: no position is used twice in a session's life
            return told(session)

    return routes
