"""The requests and answers of each kind of server for a step of a session and for whole sequences."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Sequence
from http.client import HTTPResponse
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
FEATURES, OUTPUTS = 16, 4


def request(path: str, body: bytes, content_type: str = "application/json", method: str = "POST") -> bytes:
    """Returns an HTTP request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def post(path: str, document: Any) -> bytes:
    """Returns a POST request with a JSON document."""
    return request(path, json.dumps(document).encode())


def ask(port: int, data: bytes) -> bytes:
    """Sends one request, as the load generator does, and returns the body of the answer.

    Raises:
        RuntimeError: The answer is an error.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        answer = HTTPResponse(connection)
        answer.begin()
        body = answer.read()
    if answer.status // 100 != 2:
        raise RuntimeError(f"answered {answer.status}: {body[:500].decode(errors='replace')}")
    return body


class Cellserve:
    """Cellserve's JSON, which the `usual` peers also speak.

    `x` is one time step, `[features]`. Sequences are lists of numbers, `[time, features]` each; the answer has the
    outputs of all time steps, `[time, outputs]`.
    """

    def session(self, port: int) -> str:
        """Opens a session and returns its id."""
        return str(json.loads(ask(port, post("/sessions", {})))["session"])

    def step(self, session: str, x: list[float], first: bool = False) -> bytes:
        """Returns the request for a step; `first` marks the first step of a session, which starts it."""
        return post(f"/sessions/{session}/step", {"x": x})

    def y(self, body: bytes) -> Array:
        """Reads the answer to a step, `[outputs]`."""
        return np.asarray(json.loads(body)["y"], np.float32)

    def predict(self, sequences: Sequence[Any]) -> bytes:
        """Returns the request for whole sequences."""
        return post("/predict", {"sequences": sequences})

    def outputs(self, body: bytes, lengths: list[int]) -> list[Array]:
        """Reads the answer to a request for whole sequences, an array for each."""
        return [np.asarray(output, np.float32) for output in json.loads(body)["outputs"]]


class Floor(Cellserve):
    """The floor, which answers every request with the same constant."""

    def session(self, port: int) -> str:
        return "0" * 32


class Mosec(Cellserve):
    """One route per worker; the session's id is in the body."""

    _numbers = itertools.count()

    def session(self, port: int) -> str:
        return f"session-{next(self._numbers)}"

    def step(self, session: str, x: list[float], first: bool = False) -> bytes:
        return post("/step", {"sid": session, "x": x})


class Triton(Cellserve):
    """The Open Inference Protocol in JSON, with Triton's sequence parameters.

    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_sequence.md
    """

    _numbers = itertools.count(1)  # 0 means no sequence

    def session(self, port: int) -> str:
        return str(next(self._numbers))

    def step(self, session: str, x: list[float], first: bool = False) -> bytes:
        parameters = {"sequence_id": int(session), "sequence_start": first}
        return post("/v2/models/step/infer", {"parameters": parameters, "inputs": [_tensor("x", [1, FEATURES], x)]})

    def y(self, body: bytes) -> Array:
        return np.asarray(json.loads(body)["outputs"][0]["data"], np.float32)

    def predict(self, sequences: Sequence[Any]) -> bytes:
        lengths = [len(sequence) for sequence in sequences]
        # Flat, since Triton takes longer to read nested lists.
        x = list(itertools.chain.from_iterable(itertools.chain.from_iterable(sequences)))
        inputs = [
            _tensor("x", [1, sum(lengths), FEATURES], x),
            _tensor("lengths", [1, len(lengths)], lengths, "INT32"),
        ]
        return post("/v2/models/predict/infer", {"inputs": inputs})

    def outputs(self, body: bytes, lengths: list[int]) -> list[Array]:
        y = self.y(body).reshape(-1, OUTPUTS)
        return np.split(y, np.cumsum(lengths)[:-1])


def _tensor(name: str, shape: list[int], data: list[Any], datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


DIALECTS: dict[str, Cellserve] = {
    "cellserve": Cellserve(),
    "redis": Cellserve(),
    "process": Cellserve(),
    "disk": Cellserve(),
    "usual": Cellserve(),
    "usual_keras": Cellserve(),
    "floor": Floor(),
    "mosec": Mosec(),
    "triton": Triton(),
}
