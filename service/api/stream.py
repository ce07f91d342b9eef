"""`WS /stream`: many sessions over one socket, in JSON frames or in binary frames of many steps each.

`docs/protocol.md` describes the frames to the byte.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from service.api.messages import Receive, Scope, Send, as_problem
from service.api.sessions import step_answer, told
from service.errors import InvalidInput, Problem, UnknownSession
from service.service import Service
from service.sessions import Session
from service.tensors import decode

Array = NDArray[Any]

# A binary frame: kind, ref, number of sessions, time steps; all that follows is little-endian too.
_HEADER = struct.Struct("<4I")
STEP, STEPPED = 1, 0x81


class _Frame(msgspec.Struct, tag_field="op", kw_only=True, forbid_unknown_fields=True):
    ref: msgspec.Raw = msgspec.Raw(b"null")  # comes back with the answer


class Open(_Frame, tag="open", kw_only=True):
    """Creates a session."""

    model: str | None = None
    states: msgspec.Raw = msgspec.Raw(b"null")


class Attach(_Frame, tag="attach", kw_only=True):
    """Gives a handle for a session that was opened elsewhere."""

    session: str


class Step(_Frame, tag="step", kw_only=True):
    """Steps a session, named by its handle or its id."""

    session: int | str
    x: msgspec.Raw
    outputs: Literal["last", "all"] | None = None


class _PlainStep(_Frame, tag="step", kw_only=True):
    session: int | str
    x: list[float]
    outputs: Literal["last", "all"] | None = None


class Close(_Frame, tag="close", kw_only=True):
    """Deletes a session."""

    session: int | str


_decoder: msgspec.json.Decoder[Open | Attach | Step | Close] = msgspec.json.Decoder(Open | Attach | Step | Close)


_plain_decoder = msgspec.json.Decoder(_PlainStep)


class _Ref(msgspec.Struct):
    ref: msgspec.Raw = msgspec.Raw(b"null")


_ref_decoder = msgspec.json.Decoder(_Ref)


class Stream:
    """The endpoint, plain ASGI: one instance serves all sockets."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one socket until it is closed."""
        await receive()
        await send({"type": "websocket.accept"})
        await _Socket(self.service, send).serve(receive)


class _Socket:
    """One socket. Frames are answered as they are done, at most `stream_window` of them under way.

    A client that does not read its answers fills the window, and its frames are not read until it does.
    """

    kinds: ClassVar[dict[int, str]] = {STEP: "step"}

    def __init__(self, service: Service, send: Send) -> None:
        self.service = service
        self.send = send
        self.sessions: list[Session] = []  # by handle
        self.handles: dict[str, int] = {}
        self.under_way: set[asyncio.Task[None]] = set()
        self.window = service.settings.stream_window

    async def serve(self, receive: Receive) -> None:
        """Reads frames until the socket is closed; what nobody waits for any more is dropped."""
        loop = asyncio.get_running_loop()
        try:
            while (message := await receive())["type"] == "websocket.receive":
                while len(self.under_way) >= self.window:
                    await asyncio.wait(self.under_way, return_when=asyncio.FIRST_COMPLETED)
                task = loop.create_task(self._answer(message))
                self.under_way.add(task)
                task.add_done_callback(self._ended)
        finally:
            for task in self.under_way:
                task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        if not task.cancelled():
            task.exception()  # the socket is gone: there is nobody to tell

    async def _answer(self, message: Any) -> None:
        text, binary = message.get("text"), message.get("bytes")
        try:
            if text is not None:
                await self._send_json(await self._text(text.encode()))
            else:
                await self._binary(binary)
        except Exception as error:
            problem = as_problem(error, {"method": "WS", "path": "/stream"})
            await self._send_json(_problem(_ref_of(text, binary), problem))

    async def _text(self, body: bytes) -> dict[str, Any]:
        table = self.service.sessions
        try:
            # What nearly every frame is, in one pass; all else, and every error, takes the long way.
            plain = _plain_decoder.decode(body)
            session = self._session(plain.session)
            plain_x = session.model.reader.single(plain.x)
            if plain_x is not None:
                answer: dict[str, Any] = {"op": "step", "ref": orjson.Fragment(bytes(plain.ref))}
                return answer | await step_answer(table, session, plain_x, True, plain.outputs)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass
        frame = decode(_decoder, body)
        answer = {"op": frame.__struct_config__.tag, "ref": orjson.Fragment(bytes(frame.ref))}
        match frame:
            case Step():
                session = self._session(frame.session)
                x, single = session.model.reader.x(frame.x)
                return answer | await step_answer(table, session, x, single, frame.outputs)
            case Open():
                engine = self.service.engine(frame.model)
                given = bytes(frame.states) != b"null"
                session = table.create(engine, engine.model.reader.state(frame.states) if given else None)
            case Attach():
                session = table.get(frame.session)
            case Close():
                session = self._session(frame.session)
                await table.delete(session.id)
                return answer | {"session": session.id}
        return answer | {"handle": self._handle(session)} | told(table, session)

    def _handle(self, session: Session) -> int:
        if session.id not in self.handles:
            self.handles[session.id] = len(self.sessions)
            self.sessions.append(session)
        return self.handles[session.id]

    def _session(self, name: int | str) -> Session:
        if isinstance(name, str):
            return self.service.sessions.get(name)
        if not 0 <= name < len(self.sessions):
            raise UnknownSession(f"session: no handle {name} on this socket: open or attach the session first")
        return self.service.sessions.get(self.sessions[name].id)

    async def _binary(self, body: bytes) -> None:
        ref, sessions, x = self._steps(body)
        y, positions, problems = await self.service.sessions.step_many(sessions, x)
        count, steps = x.shape[:2]
        statuses = np.zeros(count, "<u4")
        for row, problem in problems.items():
            statuses[row] = problem.status
        parts = _HEADER.pack(STEPPED, ref, count, steps), positions.astype("<u8"), statuses, y.astype("<f4")
        await self.send({"type": "websocket.send", "bytes": b"".join([bytes(part) for part in parts])})
        for row, problem in problems.items():
            await self._send_json(_problem(ref, problem, session=sessions[row].id, row=row))

    def _steps(self, body: bytes) -> tuple[int, list[Session], Array]:
        """Reads a binary frame: its ref, the sessions and x `[sessions, time, *features]`."""
        if len(body) < _HEADER.size:
            raise InvalidInput(f"the frame has {len(body)} bytes: its header alone has {_HEADER.size}")
        kind, ref, count, steps = _HEADER.unpack_from(body)
        if kind not in self.kinds:
            raise InvalidInput(f"kind: {kind} is none: send {STEP} to step")
        if not count or not steps:
            raise InvalidInput(f"the frame has {count} sessions and {steps} time steps: send at least one of each")
        start = _HEADER.size + 4 * count
        if len(body) < start:
            raise InvalidInput(f"the frame has {len(body)} bytes: {count} handles alone need {start}")
        handles = np.frombuffer(body, "<u4", count, _HEADER.size)
        if int(handles.max()) >= len(self.sessions):
            raise UnknownSession(f"no handle {int(handles.max())} on this socket: open or attach the session first")
        named = handles.tolist()
        if len(set(named)) < count:
            raise InvalidInput("a session stands in the frame twice: send its time steps side by side, or two frames")
        sessions = [self.sessions[handle] for handle in named]
        engine = sessions[0].engine
        if any(session.engine is not engine for session in sessions):
            raise InvalidInput("the sessions are of several models: send a frame for each model")
        shape = count, steps, *engine.model.reader.spec.shape
        x = np.frombuffer(body, "<f4", offset=start) if (len(body) - start) % 4 == 0 else np.empty(0, "<f4")
        if x.size != np.prod(shape):
            whole = start + 4 * int(np.prod(shape, dtype=np.int64))
            raise InvalidInput(f"the frame has {len(body)} bytes: x of shape {list(shape)} in float32 makes it {whole}")
        x = x.reshape(shape)
        if not np.isfinite(x).all():
            place = "x" + "".join(f"[{number}]" for number in np.argwhere(~np.isfinite(x))[0])
            raise InvalidInput(f"{place}: not a finite number", place=place)
        return ref, sessions, x

    async def _send_json(self, document: Any) -> None:
        text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY).decode()
        await self.send({"type": "websocket.send", "text": text})


def _problem(ref: Any, problem: Problem, **more: Any) -> dict[str, Any]:
    return {"op": "error", "ref": ref, **more, "problem": orjson.Fragment(problem.document())}


def _ref_of(text: str | None, binary: bytes | None) -> Any:
    """Gives the ref of a frame that did not fit, as far as it can be read."""
    if text is None:
        return _HEADER.unpack_from(binary)[1] if binary and len(binary) >= _HEADER.size else None
    try:
        return orjson.Fragment(bytes(_ref_decoder.decode(text).ref))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
