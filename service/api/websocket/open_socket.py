"""One open socket of `/stream`: its sessions, the frames in flight, and their answers."""

from __future__ import annotations

import asyncio
from codecs import getincrementaldecoder
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from functools import partial
from itertools import repeat
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.types import Message, Receive, Scope, Send

from cellserve.service.access.keys import HeldKey
from cellserve.service.api.answer_size import check_exchange, check_json_answer
from cellserve.service.api.asgi import as_problem
from cellserve.service.api.connections.bounded_websocket import FRAMES_EXTENSION, BoundedWebSocket
from cellserve.service.api.json_parts import encoded
from cellserve.service.api.session_requests import (
    ForkRequest,
    create_session,
    fork_session,
    step_options,
)
from cellserve.service.api.step_codec import session_json, step_json, wants_all_outputs
from cellserve.service.api.websocket import binary_frames, json_frames
from cellserve.service.api.websocket.binary_frames import STEP, Frame, Group
from cellserve.service.api.websocket.frame_window import FrameWindow
from cellserve.service.api.websocket.json_frames import Attach, Auth, Close, Fork, Open, Reset, Step
from cellserve.service.context import ServiceContext
from cellserve.service.errors import (
    InvalidInput,
    Problem,
    UnknownSession,
    excerpt,
)
from cellserve.service.idempotency import HASHED_AT_ONCE, IdempotencyKey, hashed, state_key, step_key
from cellserve.service.observability.request_context import get_context, problem_body
from cellserve.service.sessions.pending_steps import BatchStepResult, PendingBatch, PendingStep, StepResult
from cellserve.service.sessions.session import Session, current_client
from cellserve.service.validation.decoding import ADMITTED_BYTES, LARGE_BYTES, LARGEST_SIMPLE
from cellserve.service.validation.json_input import TensorDecoder

Array = NDArray[Any]

_REFUSAL_SECONDS = 0.5
_INVALID_DATA, _POLICY_VIOLATION = 1007, 1008  # RFC 6455, section 7.4.1
_UTF8_PART = 256 * 1024  # bytes that are checked at once, in less than a millisecond
_SMALL_FRAME = 512  # bytes; 256 such frames have answers of a few MB
_CACHED_GROUPS = 8  # groups of sessions per socket


class OpenSocket:
    """One socket. Frames are answered as they complete, with at most `stream_window` of them in flight.

    A client that does not read its answers fills the window; then no further frames of it are read.
    """

    def __init__(self, service: ServiceContext, owner: str, scope: Scope, send: Send) -> None:
        self.service = service
        self.owner = owner
        self.scope, self.send = scope, send
        self.client = current_client(owner)
        self.fast: BoundedWebSocket | None = scope["extensions"].get(FRAMES_EXTENSION)
        settings = service.settings
        self.frame_window = FrameWindow(send, self.fast, settings.stream_window, settings.max_socket_bytes)
        self.key: HeldKey | None = None  # None where no keys are used
        self.counts = get_context(scope).surface
        self.sessions: list[Session] = []  # indexed by handle
        self.handles: dict[str, int] = {}
        self.groups: dict[bytes, Group] = {}  # keyed by the handles in binary frames
        self.unstarted_tasks = 0  # frames' tasks that have not started; later frames must not overtake them
        self.tasks: set[asyncio.Task[None]] = set()
        self.pending: set[PendingStep | PendingBatch] = set()  # steps submitted without a task

    async def serve(self, receive: Receive) -> None:
        """Reads frames until the socket is closed, then cancels what is still in progress."""
        loop = asyncio.get_running_loop()
        writing = loop.create_task(self.frame_window.write())
        if self.fast:
            self.fast.on_message = self._on_message
        try:
            while (message := await receive())["type"] == "websocket.receive":
                body, text = message_content(message)
                if not self._on_message(body, text):
                    self.frame_window.begin(len(body))
                    self.unstarted_tasks += 1
                    read = asyncio.Event()
                    self._spawn(self._answer(body, text, read))
                    if len(body) > (ADMITTED_BYTES if text else HASHED_AT_ONCE):
                        self.unstarted_tasks += 1
                        await read.wait()
                        self.unstarted_tasks -= 1
                    elif len(body) > _SMALL_FRAME:
                        await asyncio.sleep(0)  # it counts the bytes of its answer before the next frame is read
                if self.frame_window.is_full:
                    await self.frame_window.wait_for_room(writing)
        finally:
            if self.fast:
                self.fast.on_message = None
            writing.cancel()
            for task in self.tasks:
                task.cancel()
            for pending in self.pending:
                pending.cancel()

    async def refuse(self, problem: Problem) -> None:
        """Says why and closes the socket, at once if its client does not read."""
        try:
            async with asyncio.timeout(_REFUSAL_SECONDS):
                await refuse(self.scope, self.send, None, problem)
        except TimeoutError:
            if self.fast:
                self.fast.transport.abort()

    def _put_json(self, document: Any, size: int | None) -> None:
        """Sends or queues a message; `size` is as `FrameWindow.put` takes it."""
        self.frame_window.put(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), True, size)

    def _on_message(self, body: bytes, text: bool) -> bool:
        """Starts a frame without a task if possible; returns whether it did."""
        if self.unstarted_tasks or self.frame_window.is_full or self.service.tracing:
            return False
        if text and len(body) > LARGEST_SIMPLE:
            return False
        size = self._try_step(body) if text else self._try_frame(body)
        if size:
            self.frame_window.begin(size)
        return size > 0

    def _try_step(self, text: bytes) -> int:
        """Submits the most common JSON frame, a step of an unlocked session.

        Returns:
            The bytes of the frame and its answer, at most; 0 if it was not submitted.
        """
        try:
            frame = json_frames.simple_step_decoder.decode(text)
            session = self._session(frame.session)
            x = session.model.reader.decode_one_step(frame.x)
            once = None if x is None or frame.position is None else step_key(frame.position, x, True)
            size = len(text) + session.model.outputs.json_bytes
            on_done = partial(self._answer_step, frame.ref, session, size)
            pending = None if x is None else self.service.writer.try_submit(session, x, True, once, on_done)
        except (msgspec.MsgspecError, UnicodeError, RecursionError, Problem):
            return 0  # `_answer` reports what is wrong
        return size if self._track(pending) else 0

    def _track(self, pending: PendingStep | PendingBatch | None) -> bool:
        if pending is not None:
            self.pending.add(pending)
        return pending is not None

    def _answer_step(
        self, ref: msgspec.Raw, session: Session, size: int, pending: PendingStep, outcome: StepResult | Exception
    ) -> None:
        self.pending.discard(pending)
        answer: dict[str, Any] = {"op": "step", "ref": orjson.Fragment(bytes(ref))}
        if isinstance(outcome, Exception):
            problem = as_problem(outcome, self.scope)
            answer, status = error_frame(self.scope, answer["ref"], problem), problem.status
        else:
            answer |= step_json(self.service.sessions, session, outcome.y, outcome.position, True, True)
            answer |= {"replayed": True} if outcome.replayed else {}
            status = 200
        self.counts.record_response(status, perf_counter() - pending.item.enqueued_at)
        self._put_json(answer, size)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _try_frame(self, body: bytes) -> int:
        """Submits a binary frame of unlocked sessions; returns as `_try_step` does."""
        try:
            frame = Frame.read(body)
            group = self._group(frame.handles)
            if frame.kind != STEP or group.mixed or not self._is_alive(group):
                return 0
            model = group.sessions[0].model
            x = frame.x(model)
            size = len(body) + frame.answer_bytes(model)
            if size > self.frame_window.window_bytes:
                return 0
            on_done = partial(self._answer_frame, frame, group, size)
            pending = self.service.writer.try_submit_many(group.sessions, group.slots, x, on_done)
        except Problem:
            return 0
        return size if self._track(pending) else 0

    def _answer_frame(
        self, frame: Frame, group: Group, size: int, pending: PendingBatch, outcome: BatchStepResult | Exception
    ) -> None:
        self.pending.discard(pending)
        if isinstance(outcome, Exception):
            problem = as_problem(outcome, self.scope)
            self.counts.record_response(problem.status, perf_counter() - pending.item.enqueued_at)
            self._put_json(error_frame(self.scope, frame.ref, problem), size)
        else:
            self._put_frame(frame, group, outcome, pending.item.enqueued_at, size)

    def _is_alive(self, group: Group) -> bool:
        """Whether all sessions of a group are alive; checked again only after any session has ended."""
        endings = self.service.sessions.table.ended_count
        if group.endings != endings and all(session.alive for session in group.sessions):
            group.endings = endings
        return group.endings == endings

    async def _answer(self, body: bytes, text: bool, read: asyncio.Event) -> None:
        """Answers a frame; sets `read` when later frames may follow: they cannot overtake it any more."""
        self.unstarted_tasks -= 1
        begun, tracing = perf_counter(), self.service.tracing
        size = len(body)

        def expect(answer: int) -> None:
            """Counts the bytes of the answer."""
            nonlocal size
            size += answer
            self.frame_window.add(answer)

        try:
            with nullcontext() if tracing is None else tracing.frame(self.scope):
                if text and not await _is_utf8(body):
                    await self.send({"type": "websocket.close", "code": _INVALID_DATA})
                elif text:
                    message = await encoded(await self._text(body, expect, read), size)
                    self.counts.record_response(200, perf_counter() - begun)
                    self.frame_window.put(message, True, size)
                else:
                    frame, group, stepped = await self._binary(body, expect, read)
                    self._put_frame(frame, group, stepped, begun, size)
        except Exception as error:
            ref: Any = binary_frames.ref_of(body)
            if text:
                ref = raw_ref(await self.service.decoding.read(self.client, json_frames.ref_of, body=body))
            self._put_problem(error, ref, begun, size)
        finally:
            read.set()

    def _put_problem(self, error: Exception, ref: Any, begun: float, size: int) -> None:
        """Answers a frame with a problem."""
        # Not in the frame that has caught it, to which it refers: a cycle, which only the garbage collector frees.
        problem = as_problem(error, self.scope)
        self.counts.record_response(problem.status, perf_counter() - begun)
        self._put_json(error_frame(self.scope, ref, problem), size)

    async def _text(self, body: bytes, expect: Callable[[int], None], read: asyncio.Event) -> dict[str, Any]:
        store, decoding, client = self.service.sessions, self.service.decoding, self.client
        is_large = len(body) > LARGE_BYTES
        frame = await decoding.read(client, json_frames.read_head if is_large else json_frames.read, body=body)
        answer: dict[str, Any] = {"op": frame.__struct_config__.tag, "ref": orjson.Fragment(bytes(frame.ref))}
        match frame:
            case Auth():
                # The socket is authenticated already; from now on it lives as long as this key of the same owner.
                if self.key is not None:
                    header = json_frames.bearer_header(frame.key)
                    if self.service.owner([header], self.scope["client"]) != self.owner:
                        raise InvalidInput(
                            "key: it belongs to another owner than the socket's: open another socket with it",
                            place="key",
                        )
                    self.key.replace(header[1])
                return answer
            case Step():
                session = await self._found(frame.session)
                reader = session.model.reader
                x, single = (
                    await decoding.read(client, json_frames.read_x, reader, body=body)
                    if is_large
                    else reader.x(frame.x)
                )
                steps = len(x) if wants_all_outputs(session, frame.outputs) else 1
                expect(check_json_answer(self.frame_window.window_bytes, session.model, (x,), steps))
                every_output, key = await step_options(session, x, single, frame.outputs, frame.position)
                read.set()
                stepped = await self.service.writer.submit(session, x, every_output, key)
                answer |= step_json(store, session, stepped.y, stepped.position, single, every_output)
                return answer | ({"replayed": True} if stepped.replayed else {})
            case Open():

                async def states(reader: TensorDecoder) -> dict[str, Array] | None:
                    return await decoding.read(client, json_frames.read_states, reader, body=body)

                session, _ = await create_session(self.service, self.owner, frame.model, states, frame.session)
            case Attach():
                session = await store.fetch(self.owner, frame.session)
                _, position = await store.read_state(session)
                return answer | {"handle": self._handle(session)} | session_json(store, session, position)
            case Reset():
                session = await self._found(frame.session)
                key = None if frame.position is None else state_key(frame.position, None)
                position, replayed = await self.service.writer.set_state(session, None, key)
                return answer | session_json(store, session, position) | ({"replayed": True} if replayed else {})
            case Fork():
                session, _ = await fork_session(
                    self.service, await self._found(frame.session), ForkRequest(frame.to, frame.position)
                )
            case Close():
                session = await self._found(frame.session)
                await store.delete(self.owner, session.id, frame.position)
                return answer | {"session": session.id}
        return answer | {"handle": self._handle(session)} | session_json(store, session)

    def _handle(self, session: Session) -> int:
        if session.id not in self.handles:
            self.handles[session.id] = len(self.sessions)
            self.sessions.append(session)
        return self.handles[session.id]

    def _session(self, name: int | str) -> Session:
        if isinstance(name, str):
            return self.service.sessions.get(self.owner, name)
        if not 0 <= name < len(self.sessions):
            raise UnknownSession(
                f"session: no handle {excerpt(str(name))} on this socket: open or attach the session first"
            )
        session = self.sessions[name]
        return session if session.alive else self.service.sessions.get(self.owner, session.id)

    async def _found(self, name: int | str) -> Session:
        """Returns a session by handle or id, loading it from the store if necessary."""
        try:
            return self._session(name)
        except Problem:
            if isinstance(name, int) and not 0 <= name < len(self.sessions):
                raise
        if isinstance(name, str):
            return await self.service.sessions.fetch(self.owner, name)
        self.sessions[name] = await self.service.sessions.fetch(self.owner, self.sessions[name].id)
        return self.sessions[name]

    async def _binary(
        self, body: bytes, expect: Callable[[int], None], read: asyncio.Event
    ) -> tuple[Frame, Group, BatchStepResult]:
        frame = Frame.read(body)
        group = self._group(frame.handles)
        model = group.sessions[0].model
        x = frame.x(model)
        size = frame.answer_bytes(model)
        check_exchange(self.frame_window.window_bytes, (x,), size)
        expect(size)
        requests = None
        if frame.positions is not None:
            requests = await hashed(x, partial(_step_keys, frame.positions, x))
        if not self._is_alive(group):
            for session in group.sessions:
                if not session.alive:
                    with suppress(Problem):  # answered in the session's row
                        await self._found(self.handles[session.id])
            self.groups.clear()
            group = self._group(frame.handles)
        submit = self.service.writer.submit_versions if group.mixed else self.service.writer.submit_many
        read.set()
        return frame, group, await submit(group.sessions, group.slots, x, requests)

    def _put_frame(self, frame: Frame, group: Group, stepped: BatchStepResult, begun: float, size: int) -> None:
        for row, problem in stepped.problems.items():
            about = error_frame(self.scope, frame.ref, problem, session=group.sessions[row].id, row=row)
            self._put_json(about, None)
        status = max((problem.status for problem in stepped.problems.values()), default=200)
        self.counts.record_response(status, perf_counter() - begun)
        self.frame_window.put(binary_frames.answer(frame.kind, frame.ref, stepped), False, size)

    def _group(self, handles: NDArray[np.uint32]) -> Group:
        """Returns the group of the sessions with these handles, mostly from the cache."""
        key = handles.tobytes()
        group = self.groups.get(key)
        if group is None:
            if int(handles.max()) >= len(self.sessions):
                raise UnknownSession(f"no handle {int(handles.max())} on this socket: open or attach the session first")
            # Counted before each is looked at: a frame has room for millions.
            named = handles.tolist() if len(handles) <= len(self.sessions) else []
            if len(set(named)) < len(handles):
                raise InvalidInput("a session is in the frame twice: send its time steps in one row, or in two frames")
            group = Group.of([self.sessions[handle] for handle in named])
            if len(self.groups) >= _CACHED_GROUPS:
                self.groups.clear()
            self.groups[key] = group
        return group


def message_content(message: Message) -> tuple[bytes, bool]:
    """Returns a message, and whether it is text: a str, or with our own connection bytes, yet to be checked."""
    text = message.get("text")
    return (message["bytes"], message.get("is_text", False)) if text is None else (text.encode(), True)


async def _is_utf8(text: bytes) -> bool:
    """Whether a message can be text (RFC 6455, section 8.1); a long one is looked at in parts."""
    decoder = getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(text), _UTF8_PART):
            if start:
                await asyncio.sleep(0)
            decoder.decode(text[start : start + _UTF8_PART], start + _UTF8_PART >= len(text))
    except UnicodeDecodeError:
        return False
    return True


def _step_keys(positions: NDArray[np.uint64], x: Array) -> list[IdempotencyKey]:
    """Returns the keys of a frame's steps, x `[sessions, time, *features]`."""
    return list(map(step_key, positions.tolist(), x, repeat(True)))


async def refuse(scope: Scope, send: Send, ref: Any, problem: Problem) -> None:
    """Says why and closes the socket."""
    await send({"type": "websocket.send", "text": orjson.dumps(error_frame(scope, ref, problem)).decode()})
    await send({"type": "websocket.close", "code": _POLICY_VIOLATION})


def error_frame(scope: Scope, ref: Any, problem: Problem, **fields: Any) -> dict[str, Any]:
    """Returns the frame that answers another with a problem."""
    return {"op": "error", "ref": ref, **fields, "problem": orjson.Fragment(problem_body(problem, scope))}


def raw_ref(given: bytes | None) -> Any:
    """Returns a frame's `ref` for its answer, as it was given."""
    return None if given is None else orjson.Fragment(given)
