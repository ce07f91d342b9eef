"""The protocol over gRPC: `inference.GRPCInferenceService`, health and reflection, on their own port.

The messages are tritonclient's, generated from
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import chain
from time import perf_counter
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as pb

from cellserve.service.api.answer_size import LARGE
from cellserve.service.api.asgi import as_problem
from cellserve.service.api.client_identity import grpc_peer
from cellserve.service.api.connections.limits import ConnectionTable
from cellserve.service.api.inference import metadata
from cellserve.service.api.inference.codec import check_output
from cellserve.service.api.inference.errors import NotByProtocol, grpc_code, http_status
from cellserve.service.api.inference.grpc_front import GrpcFront
from cellserve.service.api.inference.grpc_limits import LARGEST_SMALL, CallLimit, behind_event_loop, connection_options
from cellserve.service.api.inference.grpc_messages import (
    Message,
    RequestHead,
    parse,
    read_head,
    read_tensors,
    slow_bytes,
    write_answer,
    write_head,
)
from cellserve.service.api.inference.grpc_stream import RequestStream
from cellserve.service.api.inference.service import Inference
from cellserve.service.api.inference.statistics import Timing
from cellserve.service.errors import BodyTooLarge, Problem, UnknownModel
from cellserve.service.observability.request_context import HEADER, RequestContext, make_scope, new_id
from cellserve.service.sessions.session import current_client, peer

Array = NDArray[Any]
Method = Callable[[Any, Message, Message], Awaitable[Message]]

SERVICE = "inference.GRPCInferenceService"
_SERVICE_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_UNSUPPORTED = ("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
             "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting",
             "LogSettings")  # fmt: skip

_LONGEST_MESSAGE, _LONGEST_VALUE = 1000, 100  # characters; clients refuse a status that is much larger
_POLL_SECONDS = 0.02  # between checks for requests in progress
_FLUSH_SECONDS = 0.5  # for sending the last answers

log = logging.getLogger("cellserve")


class GrpcServer:
    """The gRPC server, in the same event loop as everything else.

    Args:
        inference: Answers the requests.
    """

    def __init__(self, inference: Inference) -> None:
        self._settings = inference.service.settings
        self._methods = _Methods(inference)
        self._health = health.aio.HealthServicer()
        self._server: Any = None
        self._table = ConnectionTable(self._settings, inference.service.counts)
        self._front = GrpcFront(self._table) if sys.platform == "linux" else None

    async def start(self) -> None:
        """Starts to serve."""
        settings = self._settings
        with behind_event_loop():
            self._server = grpc.aio.server(
                interceptors=(CallLimit(settings.max_connections_per_client, self._methods.refuse),),
                options=(
                    *connection_options(settings, self._table.most),
                    ("grpc.max_receive_message_length", settings.max_body_bytes),
                    ("grpc.max_send_message_length", -1),
                    # Only workers share the port; otherwise a taken port is an error.
                    ("grpc.so_reuseport", int(settings.workers > 1)),
                ),
            )
        self._server.add_generic_rpc_handlers((_handlers(self._methods),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(_Reflection(self._methods, names), self._server)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        inner = f"{host}:{settings.grpc_port}" if self._front is None else self._front.inner
        port = self._server.add_insecure_port(inner)
        await self._server.start()
        if self._front is not None:
            port = await self._front.open(settings.host, settings.grpc_port or 0, settings.workers > 1)
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("gRPC on %s:%d", host, port)

    async def stop(self) -> None:
        """Stops after answering the requests in progress, at the latest after `shutdown_seconds`."""
        if self._front is not None:
            self._front.close()
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self._server.stop(self._settings.shutdown_seconds))
        await asyncio.sleep(0)
        methods = self._methods
        for stream in methods.streams:
            stream.end()
        while (methods.in_flight or methods.streams) and not stopping.done():
            await asyncio.sleep(_POLL_SECONDS)
        # Health watches never end by themselves.
        await asyncio.wait((stopping,), timeout=_FLUSH_SECONDS)
        await self._server.stop(None)
        await stopping


def _answering(method: Method) -> Method:
    """Wraps a method: counts its calls, and turns its exceptions into a gRPC status."""

    async def wrapper(self: Any, content: bytes, context: Message) -> Message:
        about = self.request_context(context)
        try:
            answer = await method(self, _parsed(method.__name__, content), context)
            about.surface.record_response(200, perf_counter() - about.started)
            return answer
        except Exception as error:
            problems = [_record_problem(error, about, method.__name__)]
        await _abort(context, problems.pop(), about)  # it refers to this frame, which must not refer to it

    return wrapper


def _parsed(method: str, content: bytes) -> Message:
    """Returns a method's request; those of `ModelInfer`, which may be large, are left to it."""
    described = None if method == "ModelInfer" else _SERVICE_DESCRIPTOR.methods_by_name.get(method)
    if described is not None and len(content) > LARGEST_SMALL:
        raise BodyTooLarge(
            f"the message has {len(content)} bytes: send {method} at most {LARGEST_SMALL}", limit=LARGEST_SMALL
        )
    return content if described is None else parse(GetMessageClass(described.input_type), content)


def _handlers(methods: _Methods) -> grpc.GenericRpcHandler:
    """Returns handlers that pass requests on as bytes: gRPC itself would parse them in the event loop."""
    handlers = {}
    for method in _SERVICE_DESCRIPTOR.methods:
        make = grpc.unary_unary_rpc_method_handler
        if method.server_streaming:
            make = grpc.stream_stream_rpc_method_handler
        handlers[method.name] = make(getattr(methods, method.name), response_serializer=_serialized)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _serialized(answer: Message) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


def _record_problem(error: Exception, about: RequestContext, method: str) -> Problem:
    """Returns the problem to answer with, and counts it."""
    problem = as_problem(error, make_scope(about, method="gRPC", path=method))
    about.surface.record_problem(problem)
    about.surface.record_response(http_status(problem), perf_counter() - about.started)
    return problem


async def _abort(context: Message, problem: Problem, about: RequestContext) -> None:
    fields = {name: str(value) for name, value in problem.extensions.items()} | {HEADER.decode(): about.id}
    trailing = tuple((name, value) for name, value in fields.items() if _is_metadata(value))
    await context.abort(grpc.StatusCode[grpc_code(problem)], problem.detail[:_LONGEST_MESSAGE], trailing)


def _is_metadata(value: str) -> bool:
    """Whether a value can be sent as metadata; the message contains it too."""
    return len(value) <= _LONGEST_VALUE and value.isascii() and value.isprintable()


class _Methods:
    def __init__(self, inference: Inference) -> None:
        self._inference, self._service = inference, inference.service
        self.streams: set[RequestStream] = set()
        self.in_flight = 0  # requests

    async def ServerLive(self, content: bytes, context: Message) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, content: bytes, context: Message) -> Message:
        return pb.ServerReadyResponse(ready=self._service.ready)

    @_answering
    async def ModelReady(self, request: Message, context: Message) -> Message:
        self.owner(context)
        try:
            await self._inference.engine(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._service.ready)

    @_answering
    async def ServerMetadata(self, request: Message, context: Message) -> Message:
        self.owner(context)
        return ParseDict(metadata.server(), pb.ServerMetadataResponse())

    @_answering
    async def ModelMetadata(self, request: Message, context: Message) -> Message:
        self.owner(context)
        model = (await self._inference.engine(request.name, request.version)).model
        return ParseDict(metadata.metadata(model, self._inference.versions(model.name)), pb.ModelMetadataResponse())

    @_answering
    async def ModelConfig(self, request: Message, context: Message) -> Message:
        self.owner(context)
        config = self._inference.config(await self._inference.engine(request.name, request.version))
        return ParseDict({"config": config}, pb.ModelConfigResponse())

    @_answering
    async def ModelStatistics(self, request: Message, context: Message) -> Message:
        self.owner(context)
        statistics = await self._inference.statistics_document(request.name, request.version)
        return ParseDict(statistics, pb.ModelStatisticsResponse())

    @_answering
    async def RepositoryIndex(self, request: Message, context: Message) -> Message:
        self.owner(context)
        models = metadata.index(chain.from_iterable(self._service.versions.states().values()))
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())

    @_answering
    async def RepositoryModelLoad(self, request: Message, context: Message) -> Message:
        raise metadata.loading_unsupported()

    RepositoryModelUnload = RepositoryModelLoad

    @_answering
    async def ModelInfer(self, content: bytes, context: Message) -> Message:
        owner = self.owner(context)
        client = current_client(owner)
        return await write_answer(*await self._infer(owner, client, await self._head(client, content), content))

    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], context: Message) -> AsyncIterator[bytes]:
        stream: RequestStream | None = None
        try:
            owner = self.owner(context)
            client = current_client(owner)
            settings = self._service.settings
            stream = RequestStream(
                lambda content: self._streamed(owner, client, content),
                lambda content: self._sequence_of(client, content),
                settings.stream_window,
                settings.max_socket_bytes,
            )
            self.streams.add(stream)
            with self._service.holding_key(_headers(context), owner, stream.refuse):
                async for answer in stream.answers(requests):
                    yield answer
        except Problem as problem:
            await self.refuse(context, problem, "ModelStreamInfer")
        finally:
            if stream is not None:
                self.streams.discard(stream)

    async def _sequence_of(self, client: str, content: bytes) -> tuple[str, str]:
        try:
            return (await self._head(client, content)).sequence
        except Problem:
            return "", ""  # the answer says why

    async def _streamed(self, owner: str, client: str, request: bytes) -> bytes:
        about = self.request_context()
        failed = pb.ModelInferResponse()
        try:
            head = await self._head(client, request)
            failed.model_name, failed.id = head.model, head.id
            answer, outputs = await self._infer(owner, client, head, request)
        except Exception as error:
            # Without a name here: this frame, to which the problem refers, would refer to it.
            told = _record_problem(error, about, "ModelStreamInfer").detail
            content: bytes = pb.ModelStreamInferResponse(error_message=told, infer_response=failed).SerializeToString()
            return content
        about.surface.record_response(200, perf_counter() - about.started)
        answer.parameters["triton_final_response"].bool_param = True
        return await write_answer(answer, outputs, streamed=True)

    async def _head(self, client: str, content: bytes) -> RequestHead:
        if len(content) > LARGE:
            await asyncio.sleep(0)  # receiving it took milliseconds, and so will reading it
        return await self._service.decoding.read(client, read_head, body=content, size=slow_bytes(content))

    async def _infer(
        self, owner: str, client: str, request: RequestHead, content: bytes
    ) -> tuple[Message, list[Array]]:
        """Returns the answer without what its outputs hold, and the outputs."""
        engine = await self._inference.engine(request.model, request.version)
        model, timing = engine.model, Timing()
        self.in_flight += 1
        try:
            with self._inference.statistics(engine).request(timing):
                signature = model.runtime.signature
                if len(content) > LARGE:
                    await asyncio.sleep(0)
                tensors = await self._service.decoding.read(
                    client, read_tensors, signature, body=content, size=slow_bytes(content)
                )
                for output, asked in request.outputs:
                    check_output(output, asked, signature)
                timing.decode_ended()
                any_version = not request.version
                result = await self._inference.infer(owner, engine, tensors, request.parameters, any_version)
                timing.run_ended(result.batch)
                names = [name for name, _ in request.outputs] or list(result.outputs)
                model = result.model
                head = {"model_name": model.name, "model_version": str(model.version), "id": request.id}
                outputs = {name: result.outputs[name] for name in names}
                return write_head(head, outputs, result.parameters), list(outputs.values())
        finally:
            self.in_flight -= 1

    async def refuse(self, context: Message, problem: Problem, method: str = "") -> None:
        """Ends a call with a problem."""
        about = self.request_context(context)
        await _abort(context, _record_problem(problem, about, method), about)

    def request_context(self, context: Message | None = None) -> RequestContext:
        """Returns a new context for a request, with the id in its metadata or a new one."""
        given = dict((context.invocation_metadata() or ()) if context is not None else ()).get(HEADER.decode(), "")
        return RequestContext(
            given if 0 < len(given) <= _LONGEST_VALUE else new_id(), self._service.counts.surfaces["inference"]
        )

    def owner(self, context: Message) -> str:
        """Returns the owner whose key is in a call's metadata; raises Unauthorized or TooManyWrongKeys."""
        address = grpc_peer(context.peer())
        peer.set(address)
        return self._service.owner(_headers(context), (address, 0))


def _headers(context: Message) -> list[tuple[bytes, bytes]]:
    """Returns a call's metadata as headers."""
    metadata = context.invocation_metadata() or ()
    return [(name.encode(), value.encode() if isinstance(value, str) else value) for name, value in metadata]


class _Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]
    """Reflection, for those who have a key where keys are used."""

    def __init__(self, methods: _Methods, names: Sequence[str]) -> None:
        super().__init__(names)
        self._methods = methods

    async def ServerReflectionInfo(self, requests: AsyncIterator[Message], context: Message) -> AsyncIterator[Message]:
        try:
            self._methods.owner(context)
        except Problem as problem:
            await self._methods.refuse(context, problem, "ServerReflectionInfo")
        async for answer in super().ServerReflectionInfo(requests, context):
            yield answer


@_answering
async def _unsupported(self: Any, request: Message, context: Message) -> Message:
    raise NotByProtocol("this server does not support this extension: ServerMetadata lists those it supports")


for _name in _UNSUPPORTED:
    setattr(_Methods, _name, _unsupported)
