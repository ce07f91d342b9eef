"""`/sessions`: create, step, read, reset and delete sessions."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from service.api.messages import (
    ClientGone,
    Receive,
    Scope,
    Send,
    as_problem,
    read_json_body,
    send_json,
    send_problem,
    unless_gone,
)
from service.api.predict import labelled
from service.repository import Model
from service.service import Service
from service.sessions import Session, SessionTable
from service.tensors import decode

Array = NDArray[Any]


class CreateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions`."""

    model: str | None = None
    states: msgspec.Raw = msgspec.Raw(b"null")


X = TypeVar("X")


class StepRequest(msgspec.Struct, Generic[X], forbid_unknown_fields=True):
    """The body of `POST /sessions/{id}/step`."""

    x: X
    outputs: Literal["last", "all"] | None = None


_create_decoder = msgspec.json.Decoder(CreateRequest)
_step_decoder = msgspec.json.Decoder(StepRequest[msgspec.Raw])
_plain_step_decoder = msgspec.json.Decoder(StepRequest[list[float]])


class Step:
    """`POST /sessions/{id}/step`, plain ASGI: it is one of those that carry the load."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        try:
            table = self.service.sessions
            body = await read_json_body(scope, receive, self.service.settings.max_body_bytes)
            session = table.get(scope["path"][len("/sessions/") : -len("/step")])
            x, single, outputs = _read_step(session.model, body)
            if session.engine.is_behind:
                answer = await unless_gone(step_answer(table, session, x, single, outputs), receive)
            else:
                answer = await step_answer(table, session, x, single, outputs)
            await send_json(send, answer)
        except ClientGone:
            pass
        except Exception as error:
            await send_problem(send, as_problem(error, scope))


def plain_step(model: Model, body: bytes) -> Array | None:
    """Reads what nearly every step is, one time step, in one pass: gives `[1, features]`.

    All else, and every error, takes the long way: gives None, or raises what msgspec raises.
    """
    return model.reader.single(_plain_step_decoder.decode(body).x)


def _read_step(model: Model, body: bytes) -> tuple[Array, bool, str | None]:
    """Gives x `[time, *features]`, whether it was one time step without a time axis, and the outputs asked for."""
    try:
        x = plain_step(model, body)
        if x is not None:
            return x, True, None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    request = decode(_step_decoder, body)
    return *model.reader.x(request.x), request.outputs


async def step_answer(
    table: SessionTable, session: Session, x: Array, single: bool, outputs: str | None
) -> dict[str, Any]:
    """Steps a session and gives the answer, whatever the surface.

    Args:
        table: Holds the session.
        session: The session.
        x: `[time, *features]`, checked.
        single: Whether it was sent without a time axis, as `y` is then answered.
        outputs: `last`, `all`, or None for the model's own default.
    """
    every_output = single or wants_all(session, outputs)
    advance = table.begin(session, x, every_output)
    if advance is not None:  # nobody else was there: without a coroutine more
        return written(session, (await advance.awaited)[0], advance.reached[0], single, every_output)
    y, position = await table.step(session, x, every_output)
    return written(session, y, position, single, every_output)


def wants_all(session: Session, outputs: str | None) -> bool:
    """Says whether the outputs of all time steps are wanted, where `outputs` says `last`, `all` or nothing."""
    return (outputs or session.model.document.signature.default_output) == "all"


def written(session: Session, y: Array, position: int, single: bool, every_output: bool) -> dict[str, Any]:
    """Writes the answer to a step that has given y `[time, *outputs]`."""
    output = y if every_output and not single else y[-1]
    answer: dict[str, Any] = {"session": session.id, "position": position, "y": output}
    document = session.model.document
    if document.labels is not None:
        answer["label" if output.ndim == y.ndim - 1 else "labels"] = labelled(document, [output])["labels"][0]
    return answer


def told(table: SessionTable, session: Session) -> dict[str, Any]:
    """Gives what every answer about a session says of it."""
    return {
        "session": session.id,
        "model": session.model.name,
        "version": session.model.version,
        "position": session.position,
        "expires_in": table.idle_seconds,
    }


def router(service: Service) -> APIRouter:
    """Makes the routes of everything but the step."""
    routes = APIRouter(tags=["sessions"])
    table = service.sessions

    @routes.post("/sessions", status_code=201, summary="Create a session")
    async def create(request: Request, response: Response) -> dict[str, Any]:
        body = await read_json_body(request.scope, request.receive, service.settings.max_body_bytes)
        wanted = decode(_create_decoder, body)
        engine = service.engine(wanted.model)
        states = None if bytes(wanted.states) == b"null" else engine.model.reader.state(wanted.states)
        session = table.create(engine, states)
        response.headers["location"] = f"/sessions/{session.id}"
        return told(table, session)

    @routes.get("/sessions/{session_id}", summary="Read where a session is")
    async def read(session_id: str) -> dict[str, Any]:
        session = table.get(session_id)
        table.touch(session)
        return told(table, session)

    @routes.delete("/sessions/{session_id}", status_code=204, summary="Delete a session")
    async def delete(session_id: str) -> None:
        await table.delete(session_id)

    @routes.post("/sessions/{session_id}/reset", summary="Set a session's state to zeros")
    async def reset(session_id: str) -> dict[str, Any]:
        async with table.turn(table.get(session_id)) as session:
            session.engine.arena.write(session.slot, None)
            # A reset is a change too: no position is used twice in a session's life.
            session.engine.arena.position[session.slot] += 1
            return told(table, session)

    return routes
