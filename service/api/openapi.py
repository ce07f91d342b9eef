"""The OpenAPI document: FastAPI's, plus the plain ASGI endpoints and examples of every body."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.routing import Route

from cellserve.service.api.inference import openapi as inference
from cellserve.service.api.safetensors import MEDIA_TYPES
from cellserve.service.context import ServiceContext

_SESSION = {"session": "0b54b1fd5d2a4f3f9d63a3a1e6a1c0de", "model": "sunspots", "version": 1, "position": 0,
            "created_at": "2026-11-28T12:00:00.000Z", "expires_in": 3600.0, "durable": "none"}  # fmt: skip
# How deep numbers are nested, and where an object keyed by tensor stands for an array, differs between models.
_SEQUENCE = {"type": ["array", "object"], "items": {"type": ["array", "integer", "number"], "items": {}}}
_STATES = {"type": ["object", "null"], "description": "one array per state, by tensor name: see GET /models/{name}"}
_OUTPUTS = {"enum": ["last", "all", None], "description": "outputs of the last or of all time steps; by default "
            "the model's own"}  # fmt: skip
_MODEL = {"type": ["string", "null"], "description": "NAME for its newest version, or NAME:VERSION; optional if "
          "one model is served"}  # fmt: skip

_POSITION = {
    "type": ["integer", "null"],
    "minimum": 0,
    "description": "the position that the session must be at; repeating the request then applies it once",
}

_BYTES = {"type": "string", "format": "binary"}
_SAFETENSORS = MEDIA_TYPES[0].decode()


def install(app: FastAPI, service: ServiceContext) -> None:
    """Completes the application's OpenAPI document."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            document["components"] = {"schemas": {"Problem": _problem()}}
            paths = document["paths"]
            paths["/predict"] = {"post": _predict()}
            paths["/sessions/{session_id}/step"] = {"post": _step()}
            paths["/sessions/{session_id}/rollout"] = {"post": _rollout()}
            paths["/sessions"]["post"]["requestBody"] = _body(
                {"model": _MODEL, "states": _STATES}, {"model": "sunspots"}, required=[]
            ) | {"required": False}
            paths["/sessions"]["post"]["responses"]["201"] = _answer("the session", _SESSION)
            paths["/sessions/{session_id}"]["put"]["requestBody"] = paths["/sessions"]["post"]["requestBody"]
            for status in ("200", "201"):
                paths["/sessions/{session_id}"]["put"]["responses"][status] = _answer("the session", _SESSION)
                paths["/sessions/{session_id}/fork"]["post"]["responses"][status] = _answer("the session", _SESSION)
            fork = _body({"session": {"type": ["string", "null"]}, "position": _POSITION}, {"session": "other"}, [])
            paths["/sessions/{session_id}/fork"]["post"]["requestBody"] = {**fork, "required": False}
            reset = _body({"position": _POSITION}, {"position": 12}, [])
            paths["/sessions/{session_id}/reset"]["post"]["requestBody"] = {**reset, "required": False}
            tensors = {"content": {kind.decode(): {"schema": _BYTES} for kind in MEDIA_TYPES}}
            paths["/sessions/{session_id}/state"]["put"]["requestBody"] = {**tensors, "required": True}
            paths["/sessions/{session_id}/state"]["get"]["responses"]["200"] = {"description": "the state", **tensors}
            paths["/sessions/{session_id}/state"]["put"]["responses"]["200"] = _answer("the session", _SESSION)
            paths["/sessions/{session_id}"]["get"]["responses"]["200"] = _answer("the session", _SESSION)
            paths["/sessions/{session_id}/reset"]["post"]["responses"]["200"] = _answer(
                "the session", {**_SESSION, "position": 13}
            )
            for path in paths.values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["4XX"] = _problems("The request is invalid; the detail says where and why.")
                    operation["responses"]["5XX"] = _problems(
                        "Nothing was applied; Retry-After says when to try again."
                    )
            paths |= inference.paths()
            if service.settings.root_path:
                document["servers"] = [{"url": service.settings.root_path}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = whole  # type: ignore[method-assign]
    written = cache(lambda: json.dumps(whole(), separators=(",", ":")).encode())

    async def send(request: Request) -> Response:
        return Response(written(), media_type="application/json")

    # FastAPI's own route would write the document anew for each request.
    routes = app.router.routes
    routes[:] = [
        Route("/openapi.json", send) if getattr(route, "path", "") == "/openapi.json" else route for route in routes
    ]


def _predict() -> dict[str, Any]:
    operation = _predict_json()
    operation["description"] = "Also in safetensors, with the options in the query: see docs/reference/protocol.md."
    tensors = {"schema": _BYTES}
    operation["requestBody"]["content"] |= {kind.decode(): tensors for kind in MEDIA_TYPES}
    operation["responses"]["200"]["content"][_SAFETENSORS] = tensors
    operation["parameters"] = [
        {"name": name, "in": "query", "schema": schema, "description": "for a body in safetensors"}
        for name, schema in (("model", _MODEL), ("outputs", _OUTPUTS), ("return_states", {"type": "boolean"}))
    ]
    return operation


def _predict_json() -> dict[str, Any]:
    return {
        "tags": ["predict"],
        "summary": "Predict whole sequences",
        "operationId": "predict",
        "requestBody": _body(
            {
                "model": _MODEL,
                "sequences": {
                    "type": "array",
                    "items": _SEQUENCE,
                    "description": "[sequence][time][feature]; sequences may differ in length; an object keyed "
                    "by tensor in place of [time][feature] if the model has several inputs",
                },
                "outputs": _OUTPUTS,
                "states": {
                    "type": ["array", "null"],
                    "items": _STATES,
                    "description": "one per sequence, to start from; null: zeros",
                },
                "return_states": {"type": "boolean", "description": "also return each sequence's final states"},
            },
            {"model": "sunspots", "sequences": [[[96.7], [104.3], [116.7]], [[92.8]]], "outputs": "last"},
            required=["sequences"],
        ),
        "responses": {
            "200": _answer(
                "outputs in the order of the sequences, and labels where the model has them",
                {"model": "sunspots", "version": 1, "outputs": [[115.2], [94.1]]},
            )
        },
    }


def _step() -> dict[str, Any]:
    return {
        "tags": ["sessions"],
        "summary": "Step a session by one or more time steps",
        "operationId": "step",
        "parameters": [{"name": "session_id", "in": "path", "required": True, "schema": {"type": "string"}}],
        "requestBody": _body(
            {
                "x": {
                    "type": ["array", "integer", "number", "object"],
                    "items": {"type": ["array", "integer", "number"], "items": {}},
                    "description": "one time step [feature], or several [time][feature], all or none; a number if "
                    "a time step is one number, an object keyed by tensor if the model has several inputs",
                },
                "outputs": _OUTPUTS,
                "position": _POSITION,
            },
            {"x": [96.7], "position": 0},
            required=["x"],
        ),
        "responses": {
            "200": _answer(
                "the position after the step, and the output",
                {"session": _SESSION["session"], "position": 1, "y": [97.2], "durable": "none"},
            )
        },
    }


def _rollout() -> dict[str, Any]:
    step = _step()
    x = step["requestBody"]["content"]["application/json"]["schema"]["properties"]["x"]
    last_event = {"name": "Last-Event-ID", "in": "header", "schema": {"type": "string", "pattern": "^[0-9]*$"},
                  "description": "the last event received: the stream continues after it"}  # fmt: skip
    answer = _answer(
        "generated symbols with their labels or text, or y; as events if requested",
        {"session": _SESSION["session"], "position": 13, "symbols": [46, 43, 1], "text": "he ", "durable": "none"},
    )
    answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        **step,
        "summary": "Generate autoregressively: a session's outputs become its next inputs",
        "description": "With `stream`, or Accept: text/event-stream, in events: see docs/reference/protocol.md.",
        "operationId": "rollout",
        "parameters": [*step["parameters"], last_event],
        "requestBody": _body(
            {
                "steps": {
                    "type": "integer",
                    "minimum": 1,
                    "description": "outputs to generate",
                },
                "x": x,
                "text": {"type": "string", "description": "x as characters, if the model's symbols are characters"},
                "position": _POSITION,
                "temperature": {"type": "number", "minimum": 0, "default": 1, "description": "0: the most probable"},
                "top_k": {
                    "type": ["integer", "null"],
                    "minimum": 1,
                    "description": "sample from this many likeliest symbols",
                },
                "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0},
                "stream": {"type": "boolean", "default": False},
            },
            {"text": "Alice was", "steps": 100, "temperature": 0.7, "seed": 1, "position": 0},
            required=["steps"],
        ),
        "responses": {"200": answer},
    }


def _body(properties: dict[str, Any], example: Any, required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required:
        schema["required"] = required
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def _answer(description: str, example: Any) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"type": "object"}, "example": example}},
    }


def _problem() -> dict[str, Any]:
    texts = {name: {"type": "string"} for name in ("type", "title", "detail", "request_id")}
    return {
        "type": "object",
        "description": "RFC 9457",
        "properties": {**texts, "status": {"type": "integer"}, "place": {"type": "string"}},
        "required": ["type", "title", "status", "detail"],
        "examples": [
            {
                "type": "urn:cellserve:problem:invalid-input",
                "title": "The input does not fit",
                "status": 422,
                "detail": "sequences[3][17][2]: not a finite number that float32 can hold",
                "place": "sequences[3][17][2]",
                "request_id": "5e0f3c1a9b7d2e48-2a",
            }
        ],
    }


def _problems(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": description, "content": {"application/problem+json": {"schema": schema}}}
