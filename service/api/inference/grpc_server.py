"""The protocol over gRPC: `inference.GRPCInferenceService`, health and reflection, on a port of their own.

The messages are tritonclient's, generated from
https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import chain
from time import perf_counter
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from cellserve.service.api.asgi import as_problem
from cellserve.service.api.inference import metadata
from cellserve.service.api.inference.codec import check_output
from cellserve.service.api.inference.errors import NotByProtocol, grpc_code, http_status
from cellserve.service.api.inference.grpc_messages import Message, plain, read_tensors, write_answer
from cellserve.service.api.inference.grpc_stream import Stream
from cellserve.service.api.inference.service import Inference
from cellserve.service.api.inference.statistics import Timing
from cellserve.service.api.operations_listener import check_free
from cellserve.service.errors import Problem, UnknownModel
from cellserve.service.observability.request_context import HEADER, RequestContext, make_scope, new_id

Method = Callable[[Any, Message, Message], Awaitable[Message]]

SERVICE = "inference.GRPCInferenceService"
_UNSUPPORTED = ("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
             "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting",
             "LogSettings")  # fmt: skip

_LONGEST_MESSAGE, _LONGEST_VALUE = 1000, 100  # letters: with many more, clients refuse the whole status
_LOOK_SECONDS = 0.02  # between looks at what is under way
_LAST_SECONDS = 0.5  # for the last answers to be sent

log = logging.getLogger("cellserve")


class GrpcServer:
    """The server; it lives in the event loop that everything else lives in.

    Args:
        inference: Answers the requests.

    Raises:
        PortTaken: Its port is not to be had.
    """

    def __init__(self, inference: Inference) -> None:
        self._settings = inference.service.settings
        settings = self._settings  # gRPC itself says in many lines, and late, that it cannot listen
        check_free("--grpc-port", settings.host, settings.grpc_port or 0, settings.workers > 1)
        self._methods = _Methods(inference)
        self._health = health.aio.HealthServicer()
        self._server: Any = None

    async def start(self) -> None:
        """Begins to serve."""
        settings = self._settings
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                # Workers share the port; otherwise a port that is taken is an error.
                ("grpc.so_reuseport", int(settings.workers > 1)),
            )
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._methods, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = self._server.add_insecure_port(f"{host}:{settings.grpc_port}")
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("gRPC on %s:%d", host, port)

    async def stop(self) -> None:
        """Ends when what was begun is answered, at the latest after `shutdown_seconds`."""
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.ensure_future(self._server.stop(self._settings.shutdown_seconds))
        await asyncio.sleep(0)
        methods = self._methods
        for stream in methods.streams:
            stream.end()
        while (methods.under_way or methods.streams) and not stopping.done():
            await asyncio.sleep(_LOOK_SECONDS)
        # Whoever watches the health would go on doing so.
        await asyncio.wait((stopping,), timeout=_LAST_SECONDS)
        await self._server.stop(None)
        await stopping


def _answering(method: Method) -> Method:
    """Counts a method's calls, and turns what it raises into a status."""

    async def answer(self: Any, request: Message, context: Message) -> Message:
        asked = self.asked(context)
        try:
            told = await method(self, request, context)
            asked.surface.record_response(200, perf_counter() - asked.begun)
            return told
        except Exception as error:
            problem = _counted(error, asked, method.__name__)
        await _abort(context, problem, asked)

    return answer


def _counted(error: Exception, asked: RequestContext, method: str) -> Problem:
    problem = as_problem(error, make_scope(asked, method="gRPC", path=method))
    asked.surface.record_problem(problem)
    asked.surface.record_response(http_status(problem), perf_counter() - asked.begun)
    return problem


async def _abort(context: Message, problem: Problem, asked: RequestContext) -> None:
    told = {name: str(value) for name, value in problem.extensions.items()} | {HEADER.decode(): asked.id}
    more = tuple((name, value) for name, value in told.items() if _is_metadata(value))
    await context.abort(grpc.StatusCode[grpc_code(problem)], problem.detail[:_LONGEST_MESSAGE], more)


def _is_metadata(value: str) -> bool:
    """Says whether metadata can hold a text; the message has it too."""
    return len(value) <= _LONGEST_VALUE and value.isascii() and value.isprintable()


class _Methods(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, inference: Inference) -> None:
        self._inference, self._service = inference, inference.service
        self.streams: set[Stream] = set()
        self.under_way = 0  # requests that are being answered

    async def ServerLive(self, request: Message, context: Message) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Message, context: Message) -> Message:
        return pb.ServerReadyResponse(ready=self._service.ready)

    @_answering
    async def ModelReady(self, request: Message, context: Message) -> Message:
        self._owner(context)
        try:
            await self._inference.engine(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._service.ready)

    @_answering
    async def ServerMetadata(self, request: Message, context: Message) -> Message:
        self._owner(context)
        return ParseDict(metadata.server(), pb.ServerMetadataResponse())

    @_answering
    async def ModelMetadata(self, request: Message, context: Message) -> Message:
        self._owner(context)
        model = (await self._inference.engine(request.name, request.version)).model
        return ParseDict(metadata.metadata(model, self._inference.versions(model.name)), pb.ModelMetadataResponse())

    @_answering
    async def ModelConfig(self, request: Message, context: Message) -> Message:
        self._owner(context)
        config = self._inference.config(await self._inference.engine(request.name, request.version))
        return ParseDict({"config": config}, pb.ModelConfigResponse())

    @_answering
    async def ModelStatistics(self, request: Message, context: Message) -> Message:
        self._owner(context)
        statistics = await self._inference.statistics_document(request.name, request.version)
        return ParseDict(statistics, pb.ModelStatisticsResponse())

    @_answering
    async def RepositoryIndex(self, request: Message, context: Message) -> Message:
        self._owner(context)
        models = metadata.index(chain.from_iterable(self._service.versions.states().values()))
        return ParseDict({"models": models}, pb.RepositoryIndexResponse())

    @_answering
    async def RepositoryModelLoad(self, request: Message, context: Message) -> Message:
        raise metadata.loading_unsupported()

    RepositoryModelUnload = RepositoryModelLoad

    @_answering
    async def ModelInfer(self, request: Message, context: Message) -> Message:
        return await self._infer(self._owner(context), request)

    async def ModelStreamInfer(self, requests: AsyncIterator[Message], context: Message) -> AsyncIterator[Message]:
        try:
            owner = self._owner(context)
        except Problem as problem:
            asked = self.asked(context)
            await _abort(context, _counted(problem, asked, "ModelStreamInfer"), asked)
        stream = Stream(lambda request: self._streamed(owner, request), self._service.settings.stream_window)
        self.streams.add(stream)
        try:
            async for answer in stream.answers(requests):
                yield answer
        finally:
            self.streams.discard(stream)

    async def _streamed(self, owner: str, request: Message) -> Message:
        asked = self.asked()
        try:
            answer = await self._infer(owner, request)
        except Exception as error:
            problem = _counted(error, asked, "ModelStreamInfer")
            told = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            return pb.ModelStreamInferResponse(error_message=problem.detail, infer_response=told)
        asked.surface.record_response(200, perf_counter() - asked.begun)
        answer.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=answer)

    async def _infer(self, owner: str, request: Message) -> Message:
        engine = await self._inference.engine(request.model_name, request.model_version)
        model, timing = engine.model, Timing()
        self.under_way += 1
        try:
            with self._inference.statistics(engine).request(timing):
                tensors = read_tensors(request, model)
                for output in request.outputs:
                    check_output(output.name, output.parameters, model)
                timing.decode_ended()
                parameters = {name: plain(value) for name, value in request.parameters.items()}
                any_version = not request.model_version
                inferred = await self._inference.infer(owner, engine, tensors, parameters, any_version)
                timing.run_ended(inferred.batch)
                wanted = [output.name for output in request.outputs] or list(inferred.outputs)
                model = inferred.model
                told = {"model_name": model.name, "model_version": str(model.version), "id": request.id}
                return write_answer(told, {name: inferred.outputs[name] for name in wanted}, inferred.parameters)
        finally:
            self.under_way -= 1

    def asked(self, context: Message | None = None) -> RequestContext:
        """Gives what there is beside a request: its id is taken from the metadata, or made."""
        given = dict((context.invocation_metadata() or ()) if context is not None else ()).get(HEADER.decode(), "")
        return RequestContext(
            given if 0 < len(given) <= _LONGEST_VALUE else new_id(), self._service.counts.surfaces["inference"]
        )

    def _owner(self, context: Message) -> str:
        metadata = context.invocation_metadata() or ()
        return self._service.owner(
            (name.encode(), value.encode() if isinstance(value, str) else value) for name, value in metadata
        )


@_answering
async def _unsupported(self: Any, request: Message, context: Message) -> Message:
    raise NotByProtocol("this server has no such extension: ServerMetadata lists those that it has")


for _name in _UNSUPPORTED:
    setattr(_Methods, _name, _unsupported)
