"""The plain install: the client without what the server needs."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = [
    "cellserve.export", "cellserve.models", "cellserve.service", "fastapi", "httptools", "keras", "msgspec",
    "onnxruntime", "orjson", "pydantic", "redis", "rich", "starlette", "tensorflow", "uvicorn", "uvloop",
]  # fmt: skip


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_client_works_without_the_packages_of_the_server() -> None:
    told = run(
        f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n"  # None: importing it fails
        "from cellserve import AsyncClient, CellserveError, Client, Retry, Timeout\n"
        "from cellserve.errors import RetriesExhausted\n"
        "client = Client('http://127.0.0.1:9', retry=Retry(attempts=1))\n"
        "assert not client.ready()\n"
        "client.stream()\n"
        "try:\n    client.models()\nexcept RetriesExhausted as error:\n    print(error)\n"
    )
    assert "gave up after 1 attempt" in told


def test_importing_the_package_imports_nothing_else() -> None:
    assert (
        run("import sys, cellserve; print([m for m in sys.modules if m in ('numpy', 'httpx', 'websockets')])") == "[]\n"
    )
