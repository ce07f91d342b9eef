"""`/sessions`: create, step, read, list, fork, reset and delete sessions, and download and upload their states."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from cellserve.service.api import safetensors
from cellserve.service.api.answer_size import check_json_answer
from cellserve.service.api.asgi import (
    REPLAY,
    ClientGone,
    as_problem,
    cancel_on_disconnect,
    check_json,
    content_type,
    read_body,
    read_json_body,
    send_problem,
)
from cellserve.service.api.json_parts import send_sized_json
from cellserve.service.api.session_requests import (
    ForkRequest,
    create_session,
    fork_session,
    step_options,
)
from cellserve.service.api.step_codec import session_json, step_json, wants_all_outputs
from cellserve.service.context import ServiceContext
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import InvalidInput, StateOfAnotherModel, UnsupportedMediaType
from cellserve.service.idempotency import hashed, state_key
from cellserve.service.sessions.session import Session, current_client, time_text
from cellserve.service.validation.json_bodies import Position, model_of_creation, read_states, read_step
from cellserve.service.validation.json_input import TensorDecoder, decode

Array = NDArray[Any]

_LARGEST_PAGE = 1000
_SMALL_BODY = 4096  # bytes of a request that holds no tensors, at most
_PAGE = r"[0-9]{1,9}\.[0-9]{1,1250}"  # with LMDB the number holds a key of up to 511 bytes


class ResetRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions/{id}/reset`."""

    position: Position | None = None


_fork_decoder = msgspec.json.Decoder(ForkRequest)
_reset_decoder = msgspec.json.Decoder(ResetRequest)


class StepEndpoint:
    """`POST /sessions/{id}/step`, plain ASGI for speed."""

    def __init__(self, service: ServiceContext) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        try:
            owner = self.service.owner(scope["headers"], scope["client"])
            body = await read_json_body(scope, receive, self.service.settings.max_body_bytes)
            session = await self.service.sessions.fetch(owner, scope["path"][len("/sessions/") : -len("/step")])
            x, single, outputs, position = await self.service.decoding.read(
                current_client(owner), read_step, session.model.reader, body=body
            )
            steps = len(x) if wants_all_outputs(session, outputs) else 1
            size = check_json_answer(self.service.settings.max_exchange_bytes, session.model, (x,), steps)
            every_output, key = await step_options(session, x, single, outputs, position)
            work = self.service.writer.submit(session, x, every_output, key)
            stepped = await (cancel_on_disconnect(work, receive) if session.engine.may_wait(len(x)) else work)
            answer = step_json(self.service.sessions, session, stepped.y, stepped.position, single, every_output)
            await send_sized_json(send, receive, answer, size, REPLAY if stepped.replayed else ())
        except ClientGone:
            pass
        except Exception as error:
            await send_problem(send, as_problem(error, scope), scope)


async def _check_query(request: Request) -> None:
    """Raises InvalidInput if the query has a parameter that the path does not take."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            advice = f"send {', '.join(known)}, or none" if known else "send none"
            raise InvalidInput(f"{name[:80]}: unknown query parameter: {advice}", place=name[:80])


router = APIRouter(tags=["sessions"], dependencies=[Depends(_check_query)])


@router.post("/sessions", status_code=201, summary="Create a session")
async def post(request: Request, response: Response) -> dict[str, Any]:
    """Creates a session, of zeros or of given states."""
    service, _ = _caller(request)
    body = await _optional_body(request, service.settings.max_body_bytes)
    return await _create(request, response, body)


@router.put("/sessions/{session_id}", status_code=201, summary="Create a session under an id of your choice")
async def put(session_id: str, request: Request, response: Response) -> dict[str, Any]:
    """Creates a session under an id; repeating the request does no harm."""
    service, _ = _caller(request)
    body = await _optional_body(request, service.settings.max_body_bytes)
    return await _create(request, response, body, session_id)


@router.get("/sessions", summary="List your sessions, page by page")
async def pages(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=_LARGEST_PAGE)] = 100,
    after: Annotated[
        str, Query(description="`next` of the page before", json_schema_extra={"pattern": f"^{_PAGE}$"})
    ] = "0.0",
) -> dict[str, Any]:
    """Lists the caller's live sessions."""
    service, owner = _caller(request)
    if not re.fullmatch(_PAGE, after):
        raise InvalidInput(f"after: {after[:80]!r} is not a page: send `next` of the page before", place="after")
    engine, _, slot = after.partition(".")
    sessions, following = await service.sessions.page(owner, (int(engine), int(slot)), limit)
    return {
        "sessions": [
            {"session": one.id, "model": one.model, "version": one.version, "position": one.position,
             "created_at": time_text(one.created_at)}
            for one in sessions
        ],
        "next": None if following is None else f"{following[0]}.{following[1]}",
    }  # fmt: skip


@router.get("/sessions/{session_id}", summary="Read where a session is")
async def read(session_id: str, request: Request) -> dict[str, Any]:
    """Returns a session's model, version and position, and when it was created."""
    service, session = await _find(request, session_id)
    _, position = await service.sessions.read_state(session)
    return session_json(service.sessions, session, position)


@router.delete("/sessions/{session_id}", status_code=204, summary="Delete a session")
async def delete(session_id: str, request: Request, position: Annotated[int | None, Query(ge=0)] = None) -> None:
    """Deletes a session; with a position, only if the session is at it."""
    service, owner = _caller(request)
    await service.sessions.delete(owner, session_id, position)


@router.post("/sessions/{session_id}/reset", summary="Set a session's state to zeros")
async def reset(session_id: str, request: Request, response: Response) -> dict[str, Any]:
    """Sets a session's state to zeros; its position goes up by one."""
    service, session = await _find(request, session_id)
    position = decode(_reset_decoder, await _optional_body(request, _SMALL_BODY)).position
    key = None if position is None else state_key(position, None)
    return _changed(service, response, session, *await service.writer.set_state(session, None, key))


@router.post("/sessions/{session_id}/fork", status_code=201, summary="Make another session of a session's state")
async def make_fork(session_id: str, request: Request, response: Response) -> dict[str, Any]:
    """Creates a session with the state and position of another one."""
    service, session = await _find(request, session_id)
    wanted = decode(_fork_decoder, await _optional_body(request, _SMALL_BODY))
    return _created(service, response, *await fork_session(service, session, wanted))


@router.get("/sessions/{session_id}/state", summary="Download a session's state", response_class=Response)
async def state(session_id: str, request: Request) -> Response:
    """Returns a session's state in safetensors, with its position in the metadata."""
    service, session = await _find(request, session_id)
    states, position = await service.sessions.read_state(session)
    metadata = {"position": str(position), "digest": session.model.digest}
    content = safetensors.write_states(session.model, states, metadata)
    return Response(content, media_type=safetensors.MEDIA_TYPES[0].decode())


@router.put("/sessions/{session_id}/state", summary="Upload a session's state")
async def set_state(
    session_id: str, request: Request, response: Response, position: Annotated[int | None, Query(ge=0)] = None
) -> dict[str, Any]:
    """Sets a session's state to tensors in safetensors."""
    service, session = await _find(request, session_id)
    kind = content_type(request.scope)
    if kind not in safetensors.MEDIA_TYPES:
        allowed = safetensors.MEDIA_TYPES[0].decode()
        raise UnsupportedMediaType(f"the body has the content type {kind.decode('latin-1')[:100]!r}: send {allowed}")
    body = await read_body(request.scope, request.receive, service.settings.max_body_bytes)
    states = _uploaded(session.engine, body)
    key = None if position is None else await hashed(states, partial(state_key, position, states))
    return _changed(service, response, session, *await service.writer.set_state(session, states, key))


def _caller(request: Request) -> tuple[ServiceContext, str]:
    """Returns the service, and the owner whose key the request has; raises Unauthorized."""
    service: ServiceContext = request.app.state.service
    return service, service.owner(request.scope["headers"], request.scope["client"])


async def _find(request: Request, session_id: str) -> tuple[ServiceContext, Session]:
    """Returns the service, and a session of the caller."""
    service, owner = _caller(request)
    return service, await service.sessions.fetch(owner, session_id)


async def _optional_body(request: Request, limit: int) -> bytes:
    """Reads a JSON body that may be left out; `{}` then."""
    body = await read_body(request.scope, request.receive, limit)
    if body:
        check_json(content_type(request.scope))
    return body or b"{}"


async def _create(request: Request, response: Response, body: bytes, session_id: str | None = None) -> dict[str, Any]:
    """Creates a session as a body says."""
    service, owner = _caller(request)
    client, read = current_client(owner), service.decoding.read

    async def states(reader: TensorDecoder) -> dict[str, Array] | None:
        return await read(client, read_states, reader, body=body)

    model = await read(client, model_of_creation, body=body)
    return _created(service, response, *await create_session(service, owner, model, states, session_id))


def _created(service: ServiceContext, response: Response, session: Session, new: bool) -> dict[str, Any]:
    """Returns the answer with a session that was created, or was there already."""
    response.status_code = 201 if new else 200
    response.headers["location"] = f"{service.settings.root_path}/sessions/{session.id}"
    return session_json(service.sessions, session)


def _changed(
    service: ServiceContext, response: Response, session: Session, position: int, replayed: bool
) -> dict[str, Any]:
    """Returns the answer with a session whose state was set."""
    for name, value in REPLAY if replayed else ():
        response.headers[name.decode()] = value.decode()
    return session_json(service.sessions, session, position)


def _uploaded(engine: Engine, body: bytes) -> dict[str, Array]:
    """Reads an uploaded state; raises StateOfAnotherModel if its metadata name another model's digest."""
    states, metadata = safetensors.read_states(body, engine.model)
    if metadata.get("digest", engine.model.digest) != engine.model.digest:
        raise StateOfAnotherModel(
            f"the state is of model {str(metadata.get('model'))[:80]!r} (digest {str(metadata['digest'])[:64]}), "
            f"the session of {engine.model.name!r} (digest {engine.model.digest}): create a session of that model"
        )
    return states
