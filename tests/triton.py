"""tritonclient's four clients, as they come from PyPI, behind one way of asking."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import Any, NamedTuple

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from numpy.typing import NDArray

from tests.server import Server

Array = NDArray[Any]
HTTP = ("http", "http.aio", "http, JSON")
GRPC = ("grpc", "grpc.aio")
CLIENTS = (*HTTP, *GRPC)
_MODULES = {
    "http": tritonclient.http,
    "http.aio": tritonclient.http.aio,
    "http, JSON": tritonclient.http,
    "grpc": tritonclient.grpc,
    "grpc.aio": tritonclient.grpc.aio,
}


class Answer(NamedTuple):
    y: Array
    parameters: dict[str, Any]
    response: Any


class Triton:
    """One of the clients."""

    def __init__(self, kind: str, server: Server, headers: dict[str, str] | None = None) -> None:
        self.kind, self.module, self.headers = kind, _MODULES[kind], headers
        self.is_http = kind in HTTP
        self.plain = self.module.InferenceServerClient(server.url.split("//")[1] if self.is_http else server.grpc)

    def input(self, x: Array, name: str = "x", datatype: str = "FP32") -> Any:
        tensor = self.module.InferInput(name, x.shape, datatype)
        if self.is_http:
            return tensor.set_data_from_numpy(x, binary_data=self.kind != "http, JSON")
        return tensor.set_data_from_numpy(x)

    async def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the client."""
        told = getattr(self.plain, name)(*arguments, headers=self.headers, **options)
        return await told if isawaitable(told) else told

    async def infer(self, model: str, x: Array, *more: Any, **options: Any) -> Answer:
        """Asks for all outputs; sequence parameters, `parameters` and so on go as they are."""
        outputs = [self.module.InferRequestedOutput("y", binary_data=False)] if self.kind == "http, JSON" else None
        result = await self.call("infer", model, [self.input(x), *more], outputs=outputs, **options)
        response = result.get_response()
        if self.is_http:
            return Answer(result.as_numpy("y"), response.get("parameters", {}), response)
        told = {
            name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in response.parameters.items()
        }
        return Answer(result.as_numpy("y"), told, response)


@asynccontextmanager
async def triton(kind: str, server: Server, headers: dict[str, str] | None = None) -> AsyncIterator[Triton]:
    """Gives a client and closes it."""
    client = Triton(kind, server, headers)
    try:
        yield client
    finally:
        closed = client.plain.close()
        if isawaitable(closed):
            await closed


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def predicted(server: Server, model: str, x: Array) -> Array:
    """What `/predict` gives for whole sequences `[batch, time, features]`."""
    with server.client() as client:
        body = {"model": model, "sequences": x.tolist(), "outputs": "all"}
        return np.array(client.post("/predict", json=body).json()["outputs"], np.float32)
