"""The application: builds the service context and mounts the surfaces on it."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from cellserve.service.access.keys import BadKeysFile
from cellserve.service.api import openapi, operations, sessions
from cellserve.service.api.asgi import ClientGone, ProblemMiddleware, as_problem
from cellserve.service.api.browser_rules import BrowserRules, BrowserRulesMiddleware
from cellserve.service.api.connections.operations_listener import OperationsListener
from cellserve.service.api.connections.ports import PortTaken, check_port
from cellserve.service.api.curl_newline import CurlNewlineMiddleware
from cellserve.service.api.fast_path import FastPath
from cellserve.service.api.inference.http import HttpInference
from cellserve.service.api.inference.service import Inference
from cellserve.service.api.middleware import ObservabilityMiddleware
from cellserve.service.api.page import page_routes
from cellserve.service.api.predict import Predict
from cellserve.service.api.rollout import RolloutEndpoint
from cellserve.service.api.websocket.endpoint import StreamEndpoint, reject_plain_http
from cellserve.service.context import ServiceContext
from cellserve.service.errors import InvalidInput, MethodNotAllowed, NotFound, Problem, excerpt
from cellserve.service.model_repository.errors import BrokenModel
from cellserve.service.observability.request_context import problem_body
from cellserve.service.runtime.providers import RuntimeUnavailable
from cellserve.service.sessions.stores.protocol import StoreUnusable
from cellserve.service.settings import Settings

# What `create_app` raises if settings, files or the machine are to blame; the message says what to do.
CANNOT_START = BadKeysFile, BrokenModel, PortTaken, RuntimeUnavailable, StoreUnusable

_DOCS_FILES = "static-offline-docs"
# Swagger UI has an inline script and inline styles. No page of another site may show it in a frame: its buttons send
# requests that change something.
_DOCS_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# New objects between collections, which take about a millisecond for a thousand of them; the last is out of reach: a
# full collection would stop everyone.
_GC_THRESHOLDS = 10_000, 1, 10_000
_METHODS = ("DELETE", "GET", "HEAD", "POST", "PUT")


def create_app(settings: Settings) -> ObservabilityMiddleware:
    """Builds the whole application from the settings.

    Raises:
        BrokenModel: There is no model to serve.
        RuntimeUnavailable: The requested provider is not available.
        ModuleNotFoundError: A setting needs an extra that is not installed.
        PortTaken: The port for operations or for gRPC cannot be bound.
    """
    operations_listener = None
    if settings.operations_port is not None:
        operations_listener = OperationsListener(settings.host, settings.operations_port, settings.workers > 1)
    if settings.grpc_port is not None:
        check_port("grpc_port", settings.host, settings.grpc_port, settings.workers > 1)  # gRPC binds it when it starts
    service = ServiceContext(settings)
    inference = Inference(service)
    grpc_server = None
    if settings.grpc_port is not None:
        # Here and not above: the packages are an extra.
        from cellserve.service.api.inference.grpc_server import GrpcServer

        grpc_server = GrpcServer(inference)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        housekeeping = asyncio.create_task(service.run_housekeeping())
        await _build_routes(app)
        # What is loaded by now stays: the collector need not scan it again, nor run every few hundred requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        if operations_listener is not None:
            await operations_listener.open(_operations(service))
        service.started = True
        if grpc_server is not None:
            await grpc_server.start()
        yield
        if grpc_server is not None:
            await grpc_server.stop()
        housekeeping.cancel()
        with suppress(asyncio.CancelledError):
            await housekeeping
        await service.close()
        if operations_listener is not None:
            await operations_listener.close()

    app = FastAPIOffline(
        title="Cellserve",
        summary="Serves stateful recurrent models: whole sequences, or step by step with the state kept here.",
        version=importlib.metadata.version("cellserve"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_route("/docs", _docs, include_in_schema=False)
    predict, step = ProblemMiddleware(Predict(service)), sessions.StepEndpoint(service)
    app.router.routes.append(Route("/predict", predict, methods=["POST"]))
    app.router.routes.append(Route("/sessions/{session_id}/step", step, methods=["POST"]))
    roll_out = ProblemMiddleware(RolloutEndpoint(service))
    app.router.routes.append(Route("/sessions/{session_id}/rollout", roll_out, methods=["POST"]))
    app.router.routes.append(WebSocketRoute("/stream", StreamEndpoint(service)))
    app.router.routes.append(Route("/stream", ProblemMiddleware(reject_plain_http)))
    if not settings.no_page:
        app.router.routes.extend(page_routes())
    app.include_router(sessions.router)
    app.include_router(operations.main_router(with_operator_routes=settings.operations_port is None))
    app.state.service = service
    _answer_problems(app)
    openapi.install(app, service)
    hot_paths = HotPaths(app, predict, step, HttpInference(inference), settings.root_path)
    rules = BrowserRules(settings.allowed_hosts, settings.allowed_origins)
    fast_path = FastPath(service, rules)
    return ObservabilityMiddleware(CurlNewlineMiddleware(BrowserRulesMiddleware(hot_paths, rules)), service, fast_path)


async def _build_routes(app: FastAPI) -> None:
    """Asks for the API's description: FastAPI builds the routes in its first request, for which others would wait."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/openapi.json", "query_string": b"", "headers": []}
    await app(scope, receive, send)


async def _docs(request: Request) -> Response:
    """Returns the page of the API, with relative addresses: it works under any path."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Cellserve",
        swagger_js_url=f"{_DOCS_FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{_DOCS_FILES}/swagger-ui.css",
        swagger_favicon_url=f"{_DOCS_FILES}/favicon.png",
    )
    page.headers.update(_DOCS_HEADERS)
    return page


def _operations(service: ServiceContext) -> ObservabilityMiddleware:
    """Returns the application on the operations port, where no key is needed."""
    app = FastAPI(openapi_url=None)
    app.include_router(operations.operations_port_router())
    app.state.service = service
    _answer_problems(app)
    rules = BrowserRules(service.settings.allowed_hosts)
    return ObservabilityMiddleware(CurlNewlineMiddleware(BrowserRulesMiddleware(app, rules)), service)


class HotPaths:
    """Routes the most frequent requests directly to their endpoints, and all others to the FastAPI application.

    FastAPI's middleware and routing would take longer than a model's step.
    """

    def __init__(self, app: FastAPI, predict: ASGIApp, step: ASGIApp, inference: ASGIApp, root_path: str = "") -> None:
        self.app, self.predict, self.step, self.inference = app, predict, step, inference
        self.root_path = root_path

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serves one connection."""
        if scope["type"] == "http":
            path = scope["path"]
            if scope["method"] == "POST":
                if path == "/predict":
                    return self.predict(scope, receive, send)
                if path.endswith("/step") and path.startswith("/sessions/") and path.count("/") == 3:
                    return self.step(scope, receive, send)
            if path.startswith("/v2/") or path == "/v2":
                return self.inference(scope, receive, send)
        if self.root_path and scope["type"] != "lifespan":
            scope = {**scope, "root_path": self.root_path, "path": self.root_path + scope["path"]}
        return self.app(scope, receive, send)


class _NoAnswer(Response):
    """What is sent to a client that has disconnected: nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends nothing."""


def _methods(app: FastAPI, request: Request) -> str:
    """Returns the methods that a path accepts."""
    scope = {"type": "http", "path": request.scope["path"], "root_path": request.scope.get("root_path", "")}
    return ", ".join(
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in app.routes)
    )


def _answer_problems(app: FastAPI) -> None:
    def answer(request: Request, problem: Problem) -> Response:
        headers = {name.decode(): value.decode() for name, value in problem.headers()}
        return Response(problem_body(problem, request.scope), problem.status, headers)

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return answer(request, error)

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, gone: ClientGone) -> Response:
        return _NoAnswer()

    @app.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return answer(request, InvalidInput(f"{place}: {first['msg']}", place=place))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        kinds: dict[int, type[Problem]] = {404: NotFound, 405: MethodNotAllowed}
        kind = kinds.get(error.status_code, Problem)
        # Starlette names the methods of the path's first route only, and each method has its own route.
        allowed = _methods(app, request) if error.status_code == 405 else ""
        detail = f"{request.method} {excerpt(request.url.path)}: see /docs for what there is"
        response = answer(request, kind(detail, **({"allow": allowed} if allowed else {})))
        response.status_code = error.status_code
        if not allowed:
            response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def anything(request: Request, error: Exception) -> Response:
        return answer(request, as_problem(error, request.scope))
