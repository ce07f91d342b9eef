"""`WS /stream`: many sessions over one socket, in JSON frames or in binary frames of many steps each.

`docs/protocol.md` describes the frames to the byte.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from service.api.messages import Receive, Scope, Send, as_problem
from service.api.sessions import step_answer, told, written
from service.api.short_way import EXTENSION, ShortFrames
from service.arena import Slots
from service.errors import InvalidInput, Problem, UnknownSession
from service.service import Service
from service.sessions import Session
from service.tensors import decode
from service.ticks import Advance, Told

Array = NDArray[Any]

# A binary frame: kind, ref, number of sessions, time steps; all that follows is little-endian too.
_HEADER = struct.Struct("<4I")
STEP, STEPPED = 1, 0x81
_GROUPS = 8  # of sessions that a socket has stepped together are remembered
_SCOPE = {"method": "WS", "path": "/stream"}  # for the log


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


@dataclass(slots=True, eq=False)
class _Group:
    """Sessions that stand in a binary frame together."""

    sessions: list[Session]
    slots: Slots
    endings: int = -1  # how many sessions had ended when all of these were seen alive


class Stream:
    """The endpoint, plain ASGI: one instance serves all sockets."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one socket until it is closed."""
        await receive()
        await send({"type": "websocket.accept"})
        await _Socket(self.service, send, scope["extensions"].get(EXTENSION)).serve(receive)


class _Socket:
    """One socket. Frames are answered as they are done, at most `stream_window` of them under way.

    A client that does not read its answers fills the window, and its frames are not read until it does.
    """

    def __init__(self, service: Service, send: Send, short: ShortFrames | None) -> None:
        self.service = service
        self.send = send
        self.short = short  # the short way, where the server offers it
        self.sessions: list[Session] = []  # by handle
        self.handles: dict[str, int] = {}
        self.groups: dict[bytes, _Group] = {}  # by the handles of a binary frame
        self.window = service.settings.stream_window
        self.under_way = 0  # frames whose answers have not been sent yet
        self.beginning = 0  # tasks of frames that have not run yet; whoever comes later must not pass them
        self.outbox: deque[tuple[bytes, bool, bool]] = deque()  # messages, whether they are text, and the last
        self.writing = False  # one from the outbox
        self.stirred: asyncio.Future[None] | None = None  # the writer waits for something to send
        self.room: asyncio.Future[None] | None = None  # the reader waits for the window to open
        self.tasks: set[asyncio.Task[None]] = set()
        self.waiting: dict[Told, Advance] = {}  # what was begun without a task

    async def serve(self, receive: Receive) -> None:
        """Reads frames until the socket is closed; what nobody waits for any more is dropped."""
        loop = asyncio.get_running_loop()
        writing = loop.create_task(self._write())
        if self.short:
            self.short.take = self._take
        try:
            while (message := await receive())["type"] == "websocket.receive":
                text = message.get("text")
                body = message["bytes"] if text is None else text.encode()
                if not self._take(body, text is not None):
                    self.under_way += 1
                    self.beginning += 1
                    task = loop.create_task(self._answer(body, text is not None))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
                while self.under_way >= self.window and not writing.done():
                    self.room = loop.create_future()
                    await asyncio.wait((self.room, writing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self.short:
                self.short.take = None
            writing.cancel()
            for task in self.tasks:
                task.cancel()
            for done in self.waiting:
                done.cancel()

    async def _write(self) -> None:
        """Sends the answers; where the client does not read them, this waits, and the window fills."""
        loop = asyncio.get_running_loop()
        while True:
            while self.outbox:
                message, text, last = self.outbox.popleft()
                self.writing = True
                told = {"text": message.decode()} if text else {"bytes": message}
                await self.send({"type": "websocket.send", **told})
                self.writing = False
                if last:
                    self._sent()
            self.stirred = loop.create_future()
            await self.stirred

    def _sent(self) -> None:
        self.under_way -= 1
        if self.room and not self.room.done():
            self.room.set_result(None)

    def _put(self, message: bytes, text: bool, last: bool = True) -> None:
        """Gives an answer to be sent, the last one or not of what a frame is answered."""
        if self.short and not self.outbox and not self.writing and self.short.put(message, text):
            if last:
                self._sent()
            return
        self.outbox.append((message, text, last))
        if self.stirred and not self.stirred.done():
            self.stirred.set_result(None)

    def _put_json(self, document: Any, last: bool = True) -> None:
        self._put(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), True, last)

    def _take(self, body: bytes, text: bool) -> bool:
        """Begins a frame without a task of its own where that can be; says whether it has."""
        if self.beginning or self.under_way >= self.window:
            return False
        begun = self._step_at_once(body) if text else self._frame_at_once(body)
        self.under_way += begun
        return begun

    def _step_at_once(self, text: bytes) -> bool:
        """Begins what nearly every frame is, a step of a session that nobody else holds."""
        try:
            frame = _plain_decoder.decode(text)
            session = self._session(frame.session)
            x = session.model.reader.single(frame.x)
            done = Told(partial(self._answer_step, frame.ref, session))
            advance = None if x is None else self.service.sessions.begin(session, x, True, done)
        except (msgspec.MsgspecError, UnicodeError, RecursionError, Problem):
            return False  # the long way finds out what is wrong and says it
        if advance is None:
            return False
        self.waiting[done] = advance
        return True

    def _answer_step(self, ref: msgspec.Raw, session: Session, done: Told) -> None:
        advance = self.waiting.pop(done)
        answer: dict[str, Any] = {"op": "step", "ref": orjson.Fragment(bytes(ref))}
        try:
            answer |= written(session, done.result()[0], advance.reached[0], True, True)
        except Exception as error:
            answer = _problem(answer["ref"], as_problem(error, _SCOPE))
        self._put_json(answer)

    def _frame_at_once(self, body: bytes) -> bool:
        """Begins a binary frame in the same way."""
        try:
            ref, group, x = self._steps(body)
            engine = group.sessions[0].engine
            done = Told(partial(self._answer_frame, ref, group))
            advance = self.service.sessions.begin_many(engine, group.slots, x, done) if self._is_alive(group) else None
        except Problem:
            return False
        if advance is None:
            return False
        self.waiting[done] = advance
        return True

    def _answer_frame(self, ref: int, group: _Group, done: Told) -> None:
        advance = self.waiting.pop(done)
        try:
            self._put_frame(ref, group, done.result(), np.array(advance.reached), advance.problems or {})
        except Problem as problem:  # of the only row
            y = np.zeros((*advance.x.shape[:2], *group.sessions[0].model.output_shape))
            self._put_frame(ref, group, y, np.array(advance.reached), {0: problem})

    def _is_alive(self, group: _Group) -> bool:
        """Says whether all sessions of a group are alive; none of them need be asked where none has ended since."""
        endings = self.service.sessions.endings
        if group.endings != endings and all(session.alive for session in group.sessions):
            group.endings = endings
        return group.endings == endings

    async def _answer(self, body: bytes, text: bool) -> None:
        self.beginning -= 1
        try:
            if text:
                self._put_json(await self._text(body))
            else:
                await self._binary(body)
        except Exception as error:
            self._put_json(_problem(_ref_of(body, text), as_problem(error, _SCOPE)))

    async def _text(self, body: bytes) -> dict[str, Any]:
        table = self.service.sessions
        frame = decode(_decoder, body)
        answer: dict[str, Any] = {"op": frame.__struct_config__.tag, "ref": orjson.Fragment(bytes(frame.ref))}
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
        ref, group, x = self._steps(body)
        y, positions, problems = await self.service.sessions.step_many(group.sessions, group.slots, x)
        self._put_frame(ref, group, y, positions, problems)

    def _put_frame(self, ref: int, group: _Group, y: Array, positions: Array, problems: dict[int, Problem]) -> None:
        count, steps = y.shape[:2]
        statuses = np.zeros(count, "<u4")
        for row, problem in problems.items():
            statuses[row] = problem.status
        parts = _HEADER.pack(STEPPED, ref, count, steps), positions.astype("<u8"), statuses, y.astype("<f4")
        for row, problem in problems.items():
            self._put_json(_problem(ref, problem, session=group.sessions[row].id, row=row), last=False)
        self._put(b"".join([bytes(part) for part in parts]), False)

    def _steps(self, body: bytes) -> tuple[int, _Group, Array]:
        """Reads a binary frame: its ref, the sessions and x `[sessions, time, *features]`."""
        if len(body) < _HEADER.size:
            raise InvalidInput(f"the frame has {len(body)} bytes: its header alone has {_HEADER.size}")
        kind, ref, count, steps = _HEADER.unpack_from(body)
        if kind != STEP:
            raise InvalidInput(f"kind: {kind} is none: send {STEP} to step")
        if not count or not steps:
            raise InvalidInput(f"the frame has {count} sessions and {steps} time steps: send at least one of each")
        start = _HEADER.size + 4 * count
        if len(body) < start:
            raise InvalidInput(f"the frame has {len(body)} bytes: {count} handles alone need {start}")
        handles = np.frombuffer(body, "<u4", count, _HEADER.size)
        if int(handles.max()) >= len(self.sessions):
            raise UnknownSession(f"no handle {int(handles.max())} on this socket: open or attach the session first")
        group = self._group(handles)
        shape = count, steps, *group.sessions[0].model.reader.spec.shape
        x = np.frombuffer(body, "<f4", offset=start) if (len(body) - start) % 4 == 0 else np.empty(0, "<f4")
        if x.size != math.prod(shape):  # of Python's integers, which no header makes overflow
            whole = start + 4 * math.prod(shape)
            raise InvalidInput(f"the frame has {len(body)} bytes: x of shape {list(shape)} in float32 makes it {whole}")
        x = x.reshape(shape)
        if not np.isfinite(x).all():
            place = "x" + "".join(f"[{number}]" for number in np.argwhere(~np.isfinite(x))[0])
            raise InvalidInput(f"{place}: not a finite number", place=place)
        return ref, group, x

    def _group(self, handles: NDArray[np.uint32]) -> _Group:
        """Gives the sessions of some handles; mostly the same as in a frame before."""
        key = handles.tobytes()
        group = self.groups.get(key)
        if group is None:
            named = handles.tolist()
            if len(set(named)) < len(named):
                raise InvalidInput("a session is in the frame twice: send its time steps side by side, or two frames")
            sessions = [self.sessions[handle] for handle in named]
            if any(session.engine is not sessions[0].engine for session in sessions):
                raise InvalidInput("the sessions are of several models: send a frame for each model")
            if len(self.groups) >= _GROUPS:
                self.groups.clear()
            self.groups[key] = group = _Group(sessions, np.array([session.slot for session in sessions]))
        return group


def _problem(ref: Any, problem: Problem, **more: Any) -> dict[str, Any]:
    return {"op": "error", "ref": ref, **more, "problem": orjson.Fragment(problem.document())}


def _ref_of(body: bytes, text: bool) -> Any:
    """Gives the ref of a frame that did not fit, as far as it can be read."""
    if not text:
        return _HEADER.unpack_from(body)[1] if len(body) >= _HEADER.size else None
    try:
        return orjson.Fragment(bytes(_ref_decoder.decode(body).ref))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
