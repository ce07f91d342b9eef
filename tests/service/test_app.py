"""The application as a whole: what its start leaves to do for requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cellserve.service import app as application
from cellserve.service.settings import Settings


def test_routes_and_the_description_are_built_before_the_first_request(
    examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*given: Any) -> None:
        pass

    monkeypatch.setattr(application, "gc", SimpleNamespace(collect=nothing, freeze=nothing, set_threshold=nothing))
    app: Any = application.create_app(Settings(models=examples))
    while not hasattr(app, "openapi_schema"):
        app = getattr(app, "app", None) or vars(app)["_app"]

    async def start() -> Any:
        async with app.router.lifespan_context(app):
            return app.openapi_schema

    assert "/sessions/{session_id}/step" in asyncio.run(start())["paths"]
