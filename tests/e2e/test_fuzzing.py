"""Schemathesis against the OpenAPI document of a real server: whatever is sent, no answer is a server's mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FEATURES
from tests.server import Server

_CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(1500)])])
def test_every_request_is_answered_without_a_server_error(server: Server, tmp_path: Path, examples: int) -> None:
    names: dict[str, list[Any]] = {"name": ["lstm", "rnn"], "version": ["1", "2"]}
    with server.client() as client:
        for session in ("one", "lstm~7"):
            client.put(f"/sessions/{session}", json={"model": "lstm"})
        document = client.get("/openapi.json").json()
    names["session_id"] = ["one", "lstm~7"]
    example = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": [0.5] * FEATURES}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # What is there is asked for too, so that more than the path is looked at.
            for parameter in operation.get("parameters", ()):
                if parameter["name"] in names:
                    parameter["schema"] = {"anyOf": [{"enum": names[parameter["name"]]}, parameter["schema"]]}
            if path.endswith("/infer"):
                operation["requestBody"]["content"]["application/json"]["example"]["inputs"] = [example]
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document))
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", server.url, "--checks", _CHECKS,
        "--seed", "1", "--max-examples", str(examples), "--request-timeout", "60",
        "--phases", "examples,coverage,fuzzing", "--warnings", "off",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found
    assert int(found[1]) > 1000
    with server.client() as client:
        assert client.get("/readyz").status_code == client.get("/v2/health/ready").status_code == 200
