"""What models there are, and whether the service is alive and ready."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse

from cellserve.service.api.asgi import read_body
from cellserve.service.context import ServiceContext
from cellserve.service.errors import InvalidInput
from cellserve.service.model_manager import VersionState
from cellserve.service.model_repository.repository import VersionKey
from cellserve.service.observability.prometheus import MEDIA_TYPE


def router(service: ServiceContext) -> APIRouter:
    """Makes the routes."""
    routes = APIRouter()
    versions = service.versions

    def needs_key(request: Request) -> None:
        service.owner(request.scope["headers"])

    def needs_operator(request: Request) -> None:
        service.operator(request.scope["headers"])

    may = [Depends(needs_key)]

    @routes.get("/models", dependencies=may, tags=["models"], summary="List the models and how each version stands")
    async def models() -> dict[str, Any]:
        return {"models": _all(service)}

    @routes.get("/models/{name}", dependencies=may, tags=["models"], summary="Describe a model, NAME or NAME:VERSION")
    async def model(name: str) -> dict[str, Any]:
        key = VersionKey.parse(name)
        loaded = None if key is None else versions.loaded.get(key)  # sessions may be on it where none may begin
        found = (loaded or await service.engine_when_loaded(name)).model
        return {**found.described(), "versions": [_stands(state) for state in versions.states()[found.name]]}

    @routes.get("/models/{name}/versions/{version}", dependencies=may, tags=["models"], summary="Describe a version")
    async def version(name: str, version: str) -> dict[str, Any]:
        return await model(f"{name}:{version}")

    routes.include_router(own(service, [Depends(needs_operator)]))
    return routes


def own(service: ServiceContext, may: list[Any]) -> APIRouter:
    """Makes the routes that the port for operations has too; `may` keeps others from those that are not for all."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/metrics", dependencies=may, summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(await service.metrics.text(), media_type=MEDIA_TYPE)

    @routes.post(
        "/models/reload",
        dependencies=may,
        tags=["models"],
        summary="Look the model repository over now",
    )
    async def reload(request: Request) -> dict[str, Any]:
        if await read_body(request.scope, request.receive, service.settings.max_body_bytes) not in (b"", b"{}"):
            raise InvalidInput("the body: reloading takes none, it looks at all models: send the request without one")
        versions = service.versions
        before = set(versions.loaded)
        await versions.reload(again=True)
        return {"loaded": [str(key) for key in versions.loaded if key not in before], "models": _all(service)}

    @routes.head("/healthz", include_in_schema=False)
    @routes.get("/healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz", summary="Does it take requests?")
    async def readyz(response: Response) -> dict[str, str]:
        response.status_code = 200 if service.ready else 503
        return {"status": "ready" if service.ready else "not ready"}

    return routes


def _all(service: ServiceContext) -> list[dict[str, Any]]:
    return [_listed(service, name, states) for name, states in service.versions.states().items()]


def _listed(service: ServiceContext, name: str, states: list[VersionState]) -> dict[str, Any]:
    """Gives what the list tells of a model: its newest version, where one is served, and how all of them stand."""
    engine = service.engines.get(name)
    return {
        "name": name,
        "version": None if engine is None else engine.model.version,
        "description": "" if engine is None else engine.model.document.description,
        "precision": None if engine is None else engine.model.document.precision,
        "versions": [_stands(state) for state in states],
    }


def _stands(state: VersionState) -> dict[str, Any]:
    told: dict[str, Any] = {"version": state.key.version, "state": state.state, "sessions": state.sessions}
    return told | ({"reason": state.reason} if state.reason else {})
