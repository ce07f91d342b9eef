"""`/v2`: the protocol over HTTP, plain ASGI for speed."""

from __future__ import annotations

from itertools import chain

import orjson
from starlette.types import Receive, Scope, Send

from cellserve.service.api import compression
from cellserve.service.api.answer_size import LARGE
from cellserve.service.api.asgi import (
    ClientGone,
    as_problem,
    cancel_on_disconnect,
    read_body,
    read_rest,
    send_body,
    send_parts,
)
from cellserve.service.api.inference import codec, errors, metadata
from cellserve.service.api.inference.service import Inference
from cellserve.service.api.inference.statistics import Timing
from cellserve.service.errors import MethodNotAllowed, NotFound, Problem
from cellserve.service.observability.request_context import RequestContext, get_context
from cellserve.service.sessions.session import current_client

_LARGE_BODY = 16 * 1024  # bytes; running more takes longer than a step
_PATHS = ("health", "models", "repository")
_JSON = (b"content-type", b"application/json")


class HttpInference:
    """Everything under `/v2`.

    Args:
        inference: Answers the requests.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference, self._service = inference, inference.service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        try:
            path = scope["path"].removesuffix("/").split("/")[2:]
            if path and path[0] not in _PATHS:
                raise NotFound(f"{scope['path'][:200]}: this server has no such extension: see /docs for what there is")
            changing = path[:1] == ["repository"] or path[-1:] == ["infer"]
            if scope["method"] != ("POST" if changing else "GET"):
                allowed = "POST" if changing else "GET"
                raise MethodNotAllowed(f"{scope['method']} {scope['path'][:200]}: send {allowed}", allow=allowed)
            match path:
                case ["models", name, "versions", version, "infer"]:
                    await self._infer(scope, receive, send, name, version)
                case ["models", name, "infer"]:
                    await self._infer(scope, receive, send, name, "")
                case _:
                    await send_body(send, 200, [_JSON], await self._answer(scope, receive, path))
        except ClientGone:
            pass
        except Exception as error:
            await _send_problem(send, as_problem(error, scope), get_context(scope))

    async def _infer(self, scope: Scope, receive: Receive, send: Send, name: str, version: str) -> None:
        headers = dict(scope["headers"])
        owner = self._service.owner(scope["headers"], scope["client"])
        engine = await self._inference.engine(name, version)
        limit = self._service.settings.max_body_bytes
        content = await read_rest(await receive(), scope, receive, limit)
        timing = Timing()
        with self._inference.statistics(engine).request(timing):
            sent_encoding = headers.get(b"content-encoding", b"identity")
            if sent_encoding != b"identity":
                content = await compression.decompressed(content, sent_encoding, limit)
            length = codec.json_length(headers.get(codec.HEADER_LENGTH), content)
            request = await self._service.decoding.read(
                current_client(owner),
                codec.read,
                engine.model.runtime.signature,
                length,
                body=content,
                size=length or 0,
            )
            timing.decode_ended()
            as_json = not all(request.outputs.values())
            work = self._inference.infer(owner, engine, request.tensors, request.parameters, not version, as_json)
            may_wait = len(content) > _LARGE_BODY or engine.may_wait(1)
            result = await (cancel_on_disconnect(work, receive) if may_wait else work)
            timing.run_ended(result.batch)
            answer_headers, parts = codec.write(request, result)
            encoding = compression.accepted(headers.get(b"accept-encoding", b""))
            if result.size > LARGE:
                if encoding is not None:
                    answer_headers.append((b"content-encoding", encoding))
                    parts = compression.compressed_parts(parts, encoding)
                await send_parts(send, receive, answer_headers, parts)
                return
            content = b"".join(parts)
            smaller = None if encoding is None else await compression.compressed(content, encoding)
            if encoding is not None and smaller is not None:
                answer_headers, content = [*answer_headers, (b"content-encoding", encoding)], smaller
        await send_body(send, 200, answer_headers, content)

    async def _answer(self, scope: Scope, receive: Receive, path: list[str]) -> bytes:
        """Returns the body of the answer to any request but `infer`."""
        inference, service = self._inference, self._service
        match path:
            case ["health", "live"]:
                return b'{"live":true}'
            case ["health", "ready"]:
                inference.check_ready()
                return b'{"ready":true}'
        service.owner(scope["headers"], scope["client"])
        match path:
            case []:
                return orjson.dumps(metadata.server())
            case ["repository", "index"]:
                await read_body(scope, receive, service.settings.max_body_bytes)
                return orjson.dumps(metadata.index(chain.from_iterable(service.versions.states().values())))
            case ["repository", "models", _, "load" | "unload"]:
                raise metadata.loading_unsupported()
            case ["models", "stats"]:
                return orjson.dumps(await inference.statistics_document())
            case ["models", name, "versions", version, *rest]:
                return await self._describe_model(name, version, rest)
            case ["models", name, *rest]:
                return await self._describe_model(name, "", rest)
        raise NotFound(f"{scope['path'][:200]}: this server has no such extension: see /docs for what there is")

    async def _describe_model(self, name: str, version: str, what: list[str]) -> bytes:
        inference = self._inference
        engine = await inference.engine(name, version)
        match what:
            case []:
                return orjson.dumps(metadata.metadata(engine.model, inference.versions(name)))
            case ["ready"]:
                inference.check_ready()
                return orjson.dumps({"name": engine.model.name, "ready": True})
            case ["config"]:
                return orjson.dumps(inference.config(engine))
            case ["stats"]:
                return orjson.dumps(await inference.statistics_document(name, version))
        raise NotFound(f"{'/'.join(what)[:80]}: no such path of a model, or no such extension here: see /docs")


async def _send_problem(send: Send, problem: Problem, context: RequestContext) -> None:
    context.surface.record_problem(problem)
    headers = [header for header in problem.headers() if header[0] != b"content-type"]
    await send_body(send, errors.http_status(problem), [_JSON, *headers], errors.document(problem, context.id))
