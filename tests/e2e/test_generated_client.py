"""The OpenAPI document: a generator of clients makes one of it that has, and does, everything."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.helpers import frames
from tests.server import Server


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    with server.client() as client:
        return client.get("/openapi.json").json()


@pytest.fixture(scope="module")
def generated(document: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the generated package `generated_client`, which can be imported."""
    home = tmp_path_factory.mktemp("generated")
    (home / "openapi.json").write_text(json.dumps(document))
    (home / "config.yaml").write_text("post_hooks: []\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--config", "config.yaml"]
    subprocess.run([*command, "--path", "openapi.json", "--output-path", "generated_client"], cwd=home, check=True)
    sys.path.insert(0, str(home))
    yield home / "generated_client"
    sys.path.remove(str(home))


def _arrays_without_items(schema: Any, place: str = "") -> Iterator[str]:
    """Yields the places of the arrays whose items have no schema: generators leave out what contains one."""
    if isinstance(schema, dict):
        if schema.get("type") == "array" or "array" in (schema.get("type") or ()):
            yield from () if "items" in schema else (place,)
        for name, part in schema.items():
            yield from _arrays_without_items(part, f"{place}/{name}")
    elif isinstance(schema, list):
        for number, part in enumerate(schema):
            yield from _arrays_without_items(part, f"{place}/{number}")


def test_every_array_has_items(document: Any) -> None:
    assert list(_arrays_without_items({"paths": document["paths"], "components": document["components"]})) == []


def test_a_generated_client_has_every_operation(document: Any, generated: Path) -> None:
    wanted = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    made = {path.stem for path in generated.glob("api/*/*.py")} - {"__init__"}
    assert made == {re.sub("_+", "_", name) for name in wanted}
    for name in ("predict", "step"):
        assert "json" in next(generated.glob(f"api/*/{name}.py")).read_text()


def test_a_generated_client_predicts_and_steps(generated: Path, server: Server) -> None:
    def part(name: str) -> Any:
        return importlib.import_module(f"generated_client.{name}")

    x = frames(3)
    with httpx.Client(base_url=server.url) as plain:
        session = plain.post("/sessions", json={"model": "lstm"}).json()["session"]
        wanted = plain.post("/predict", json={"model": "lstm", "sequences": [x]}).json()
    with part("client").Client(base_url=server.url, verify_ssl=False) as client:
        body = part("models").PredictJsonBody(model="lstm", sequences=[x])
        assert part("api.predict.predict").sync(client=client, body=body).to_dict() == wanted
        body = part("models").StepBody(x=x)
        stepped = part("api.sessions.step").sync(session, client=client, body=body).to_dict()
    assert (stepped["position"], stepped["y"]) == (3, wanted["outputs"][0])
