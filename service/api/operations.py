"""Models and their versions, metrics, and whether the service is alive and ready."""

from __future__ import annotations

import re
import time
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse

from cellserve.service.api.asgi import read_body
from cellserve.service.context import ServiceContext
from cellserve.service.errors import InvalidInput
from cellserve.service.model_manager import VersionState
from cellserve.service.model_repository.model import VersionKey
from cellserve.service.observability.prometheus import MEDIA_TYPE


async def _require_key(request: Request) -> None:
    _service(request).owner(request.scope["headers"], request.scope["client"])


async def _require_operator(request: Request) -> None:
    _service(request).operator(request.scope["headers"], request.scope["client"])


models_router = APIRouter(tags=["models"], dependencies=[Depends(_require_key)])
operator_router = APIRouter()  # for operators, or for everybody on the operations port
health_router = APIRouter(tags=["operations"])

_METRICS = {
    "time": 1764288000.5,
    "metrics": {"cellserve_steps_total": [{"labels": {"model": "sunspots", "version": "1"}, "value": 1200.0}]},
}


@models_router.get("/models", summary="List the models and the state of each version")
async def models(request: Request) -> dict[str, Any]:
    """Lists the models."""
    return {"models": _all_models(_service(request))}


@models_router.get("/models/{name}", summary="Describe a model, NAME or NAME:VERSION")
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describes the newest version of a model, or the version NAME:VERSION."""
    service = _service(request)
    key = VersionKey.parse(name)
    # A draining version still has sessions, although it is no longer available for new ones.
    loaded = None if key is None else service.versions.loaded.get(key)
    found = (loaded or await service.engine_when_loaded(name)).model
    return {**found.described(), "versions": [_version_state(state) for state in service.versions.states()[found.name]]}


@models_router.get("/models/{name}/versions/{version}", summary="Describe a version")
async def version(name: str, version: str, request: Request) -> dict[str, Any]:
    """Describes a version of a model."""
    return await model(f"{name}:{version}", request)


@operator_router.get(
    "/metrics",
    tags=["operations"],
    summary="Metrics for Prometheus",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}, "example": _METRICS}}}},
)
async def metrics(request: Request) -> Response:
    """Returns the metrics in Prometheus's text format, or in JSON with `Accept: application/json`."""
    metrics = _service(request).metrics
    vary = {"vary": "Accept"}
    if _wants_json(request.headers.get("accept", "")):
        document = {"time": time.time(), "metrics": await metrics.samples()}
        return Response(orjson.dumps(document), media_type="application/json", headers=vary)
    return Response(await metrics.text(), media_type=MEDIA_TYPE, headers=vary)


@operator_router.post("/models/reload", tags=["operations", "models"], summary="Scan the model repository now")
async def reload(request: Request) -> dict[str, Any]:
    """Scans the model repository, and loads what is new."""
    service = _service(request)
    if await read_body(request.scope, request.receive, service.settings.max_body_bytes) not in (b"", b"{}"):
        raise InvalidInput("the body: reloading takes none, it scans all models: send the request without one")
    before = set(service.versions.loaded)
    await service.versions.reload(again=True)
    return {
        "loaded": [str(key) for key in service.versions.loaded if key not in before],
        "models": _all_models(service),
    }


@health_router.head("/healthz", include_in_schema=False)
@health_router.get("/healthz", summary="Is the process alive?")
async def healthz() -> dict[str, str]:
    """Answers as long as the process is alive."""
    return {"status": "alive"}


@health_router.head("/readyz", include_in_schema=False)
@health_router.get("/readyz", summary="Does it take requests?")
async def readyz(request: Request, response: Response) -> dict[str, str]:
    """Answers 200 if the server takes requests, otherwise 503."""
    ready = _service(request).ready
    response.status_code = 200 if ready else 503
    return {"status": "ready" if ready else "not ready"}


def main_router(with_operator_routes: bool) -> APIRouter:
    """Returns the routes on the main port; those for operators only where there is no port of their own."""
    router = APIRouter()
    router.include_router(models_router)
    if with_operator_routes:
        router.include_router(operator_router, dependencies=[Depends(_require_operator)])
    router.include_router(health_router)
    return router


def operations_port_router() -> APIRouter:
    """Returns the routes on the operations port, where no key is needed."""
    router = APIRouter()
    router.include_router(operator_router)
    router.include_router(health_router)
    return router


def _wants_json(accept: str) -> bool:
    """Whether an `Accept` header (RFC 9110, section 12.5.1) names JSON, and does not refuse it."""
    for media_range in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in media_range.split(";"))
        if kind == "application/json":
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


def _service(request: Request) -> ServiceContext:
    service: ServiceContext = request.app.state.service
    return service


def _all_models(service: ServiceContext) -> list[dict[str, Any]]:
    return [_model_summary(service, name, states) for name, states in service.versions.states().items()]


def _model_summary(service: ServiceContext, name: str, states: list[VersionState]) -> dict[str, Any]:
    """Returns a model's list entry: its newest version, if one is served, and the state of each version."""
    engine = service.engines.get(name)
    return {
        "name": name,
        "version": None if engine is None else engine.model.version,
        "description": "" if engine is None else engine.model.document.description,
        "precision": None if engine is None else engine.model.document.precision,
        "versions": [_version_state(state) for state in states],
    }


def _version_state(state: VersionState) -> dict[str, Any]:
    document: dict[str, Any] = {"version": state.key.version, "state": state.state, "sessions": state.sessions}
    return document | ({"reason": state.reason} if state.reason else {})
