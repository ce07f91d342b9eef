"""What models there are, and whether the service is alive and ready."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse

from service.metrics import MEDIA_TYPE
from service.repository import Model
from service.service import Service


def router(service: Service) -> APIRouter:
    """Makes the routes."""
    routes = APIRouter()

    def needs_key(request: Request) -> None:
        service.owner(request.scope["headers"])

    may = [Depends(needs_key)]

    @routes.get("/models", dependencies=may, tags=["models"], summary="List the models")
    async def models() -> dict[str, Any]:
        return {"models": [_short(model) for model in service.repository.models.values()]}

    @routes.get("/models/{name}", dependencies=may, tags=["models"], summary="Describe a model")
    async def model(name: str) -> dict[str, Any]:
        found = service.repository.get(name)
        document = found.document.model_dump(mode="json", exclude={"format", "name", "exactness"})
        return {
            **_short(found),
            **document,
            "digest": found.digest,
            "exact": found.exactness.proved,
            "exactness": found.exactness.why,
            "provider": found.runtime.provider,
        }

    def needs_operator(request: Request) -> None:
        service.operator(request.scope["headers"])

    routes.include_router(own(service, [Depends(needs_operator)]))
    return routes


def own(service: Service, may: list[Any]) -> APIRouter:
    """Makes the routes that the port for operations has too; `may` keeps others from those that are not for all."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/metrics", dependencies=may, summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(await service.metrics.text(), media_type=MEDIA_TYPE)

    @routes.get("/healthz", summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @routes.get("/readyz", summary="Does it take requests?")
    async def readyz(response: Response) -> dict[str, str]:
        response.status_code = 200 if service.ready else 503
        return {"status": "ready" if service.ready else "not ready"}

    return routes


def _short(model: Model) -> dict[str, Any]:
    return {"name": model.name, "version": model.version, "description": model.document.description}
