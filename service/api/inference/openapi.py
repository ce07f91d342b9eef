"""The OpenAPI document's part for `/v2`."""

from __future__ import annotations

from typing import Any

_PARAMETERS = {
    "type": "object",
    "properties": {
        "sequence_id": {"type": ["integer", "string"], "minimum": 0, "description": "0 and '' mean no sequence"},
        "sequence_start": {"type": "boolean"},
        "sequence_end": {"type": "boolean"},
        "position": {
            "type": "integer",
            "minimum": 0,
            "description": "the sequence's position; makes the request safe to repeat",
        },
        "binary_data_output": {"type": "boolean"},
    },
}
_INPUT = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"enum": ["FP32", "INT32", "INT64"]},
        "data": {"type": "array", "items": {}, "description": "numbers, flat row by row or nested"},
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
    },
}
_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "parameters": {"type": "object", "properties": {"binary_data": {"type": "boolean"}}},
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": _INPUT},
        "outputs": {"type": "array", "items": _OUTPUT},
        "parameters": _PARAMETERS,
    },
}
_EXAMPLE = {
    "inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [96.7]}],
    "parameters": {"sequence_id": 7, "sequence_start": True},
}
_INFERRED = {
    "model_name": "sunspots",
    "model_version": "1",
    "parameters": {"sequence_id": 7, "sequence_start": True, "sequence_end": False, "session": "sunspots~7",
                   "position": 1, "durable": "none"},
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 1], "data": [77.05228]}],
}  # fmt: skip
_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_DOCUMENT = {"application/json": {"schema": {"type": ["object", "array"], "items": {}}}}


def paths() -> dict[str, Any]:
    """Returns the paths."""
    found = {
        "/v2": {"get": _operation("The server's metadata", "v2_server", _DOCUMENT)},
        "/v2/health/live": {"get": _operation("Is the process alive?", "v2_live", _DOCUMENT)},
        "/v2/health/ready": {"get": _operation("Does it take requests?", "v2_ready", _DOCUMENT)},
        "/v2/models/stats": {"get": _operation("Statistics of all models", "v2_stats", _DOCUMENT)},
        "/v2/repository/index": {"post": _operation("The models that are served", "v2_index", _DOCUMENT)},
    }
    of_model = (("", "A model's metadata", _DOCUMENT), ("/ready", "Does a model take requests?", _DOCUMENT),
                ("/config", "A model's configuration, as Triton has it", _DOCUMENT),
                ("/stats", "A model's statistics", _DOCUMENT))  # fmt: skip
    for prefix, names in (
        ("/v2/models/{name}", ["name"]),
        ("/v2/models/{name}/versions/{version}", ["name", "version"]),
    ):
        parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        version = "_version" if len(names) > 1 else ""
        for suffix, summary, content in of_model:
            operation = _operation(summary, f"v2_model{suffix.replace('/', '_')}{version}", content)
            found[prefix + suffix] = {"get": {**operation, "parameters": parameters}}
        found[f"{prefix}/infer"] = {"post": {**_infer(f"v2_infer{version}"), "parameters": parameters}}
    return found


def _infer(operation_id: str) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    operation = _operation(
        "Run whole sequences, or steps of one",
        operation_id,
        {
            "application/json": {"schema": {"type": "object"}, "example": _INFERRED},
            "application/octet-stream": binary,
        },
    )
    operation["description"] = "docs/reference/inference-protocol.md: tensors as bytes, sequences and positions."
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": _INFER, "example": _EXAMPLE}, "application/octet-stream": binary},
    }
    return operation


def _operation(summary: str, operation_id: str, content: dict[str, Any]) -> dict[str, Any]:
    failed = {"content": {"application/json": {"schema": _ERROR}}}
    return {
        "tags": ["inference protocol"],
        "summary": summary,
        "operationId": operation_id,
        "responses": {
            "200": {"description": "done", "content": content},
            "4XX": {"description": "The request is invalid; the error says where and why.", **failed},
            "5XX": {"description": "Nothing was applied; Retry-After says when to try again.", **failed},
        },
    }
