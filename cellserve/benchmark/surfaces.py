"""The surfaces of Cellserve, each as a load: which clients send which requests."""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cellserve.benchmark.inputs import Input, as_json, draw_all
from cellserve.benchmark.plan import Body, Client
from cellserve.benchmark.target import BenchFailed, Target, content
from cellserve.benchmark.websocket import BINARY, TEXT, frame
from cellserve.protocol.http import SAFETENSORS, path_of
from cellserve.protocol.tensor_codec import write_safetensors
from cellserve.signatures import Signature

JSON = {"Content-Type": "application/json"}
_UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
_STEP = 1  # kind of a binary frame: a step without positions
_BODIES, _BODY_BYTES = 64, 32_000_000  # that are drawn for a load: so many, or so many bytes of them


class Load(NamedTuple):
    """The clients of a load and what they send."""

    clients: list[Client]
    bodies: list[Body]


class Steps(NamedTuple):
    """How many time steps a sequence has: a number between two, both included."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """Returns a length."""
        return int(rng.integers(self.low, self.high, endpoint=True))


class Cellserve:
    """The surfaces of a model that Cellserve serves.

    Args:
        target: The server.
        name: `NAME` or `NAME:VERSION`, as requests name the model.
        steps: Time steps of a whole sequence.

    Raises:
        BenchFailed: There is no such model, or the steps do not fit it.
    """

    def __init__(self, target: Target, name: str, steps: Steps) -> None:
        self.described: Mapping[str, Any] = target.ask_json(path_of("models", name))
        try:
            signature = self.described["signature"]
            self.inputs = [Input.read(one) for one in signature["inputs"]]
            self._layout = Signature.read(self.described).inputs
            shortest, self.predict_only = signature.get("min_steps", 1), signature["predict_only"]
        except (KeyError, TypeError):
            raise BenchFailed(f"{target.url} is not Cellserve: for another server give --protocol v2") from None
        if steps.low < shortest:
            raise BenchFailed(f"--steps: {name} takes sequences of at least {shortest} time steps")
        self.name, self.version = self.described["name"], str(self.described["version"])
        self.max_batch: int | None = target.model_config(path_of("v2", "models", self.name)).get("max_batch_size")
        self._target, self._asked, self._steps = target, name, steps
        self._rng = np.random.default_rng(0)

    @property
    def surfaces(self) -> Mapping[str, Callable[[int, int], Load]]:
        """The loads by name, each a function of the number of sessions and of sockets to share them."""
        whole = {"predict": self.predict, "predict-safetensors": self.predict_safetensors}
        if self.predict_only:
            return whole
        return {"http": self.http, "websocket": self.websocket, "frames": self.frames, **whole}

    @property
    def default_surfaces(self) -> list[str]:
        """The surfaces to measure unless others are asked for."""
        return [name for name in self.surfaces if name != "predict-safetensors"]

    def http(self, sessions: int, sockets: int) -> Load:
        """Returns clients with a session each that send one step after the other over HTTP."""
        clients = []
        for session in new_sessions(sessions):
            made = self._target.request("PUT", path_of("sessions", session), _json({"model": self._asked}))
            prefix = self._target.head("POST", path_of("sessions", session, "step"), JSON)
            clients.append(Client((made,), prefix, ends=(self._delete(session),)))
        return Load(clients, draw_bodies(lambda: Body(content(_json({"x": self._x()})), 1)))

    def websocket(self, sessions: int, sockets: int) -> Load:
        """Returns WebSockets with a session each that send one step after the other in JSON."""
        bodies = draw_bodies(lambda: Body(frame(_json({"op": "step", "session": 0, "x": self._x()}), TEXT), 1))
        return Load([self._socket([session]) for session in new_sessions(sessions)], bodies)

    def frames(self, sessions: int, sockets: int) -> Load:
        """Returns a WebSocket that steps all its sessions in one binary frame; several, if there are more sockets."""
        # All sockets send the same frames, so that they have the same number of sessions.
        count = max(count for count in range(1, min(sockets, sessions) + 1) if sessions % count == 0)
        each = sessions // count

        def body() -> Body:
            x, _ = self._layout.pack(draw_all(self.inputs, self._rng, each, 1), each)
            head = struct.pack("<4I", _STEP, 0, each, 1) + np.arange(each, dtype="<u4").tobytes()
            return Body(frame(head + x.tobytes(), BINARY), each)

        return Load([self._socket(new_sessions(each)) for _ in range(count)], draw_bodies(body))

    def predict(self, clients: int, sockets: int) -> Load:
        """Returns clients that send whole sequences to `POST /predict`, one a request, in JSON."""

        def body() -> Body:
            time = self._steps.draw(self._rng)
            sequence = as_json(draw_all(self.inputs, self._rng, time))
            return Body(content(_json({"model": self._asked, "sequences": [sequence]})), time)

        prefix = self._target.head("POST", "/predict", JSON)
        return Load([Client(prefix=prefix)] * clients, draw_bodies(body))

    def predict_safetensors(self, clients: int, sockets: int) -> Load:
        """Returns the same in safetensors."""
        names = ["x"] if len(self.inputs) == 1 else [one.name for one in self.inputs]

        def body() -> Body:
            time = self._steps.draw(self._rng)
            drawn = (one.draw(self._rng, 1, time).astype(one.dtype) for one in self.inputs)
            return Body(content(write_safetensors(dict(zip(names, drawn, strict=True)))), time)

        path = f"/predict?model={path_of(self._asked)[1:]}"
        prefix = self._target.head("POST", path, {"Content-Type": SAFETENSORS})
        return Load([Client(prefix=prefix)] * clients, draw_bodies(body))

    def _x(self) -> Any:
        """Returns one random time step as JSON has it."""
        return as_json(draw_all(self.inputs, self._rng))

    def _socket(self, sessions: list[str]) -> Client:
        opened = [_json({"op": "open", "model": self._asked, "session": session}) for session in sessions]
        upgrade = self._target.head("GET", "/stream", _UPGRADE) + b"\r\n"
        leads = (upgrade, *(frame(one, TEXT) for one in opened))
        return Client(leads, ends=tuple(map(self._delete, sessions)))

    def _delete(self, session: str) -> bytes:
        return self._target.request("DELETE", path_of("sessions", session))


def draw_bodies(draw: Callable[[], Body]) -> list[Body]:
    """Returns what a load sends in a cycle, within bounds of number and size."""
    bodies = [draw()]
    while len(bodies) < min(_BODIES, _BODY_BYTES // len(bodies[0].data)):
        bodies.append(draw())
    return bodies


def new_sessions(count: int) -> list[str]:
    """Returns ids that no one else has."""
    run = secrets.token_hex(8)
    return [f"bench-{run}-{number}" for number in range(count)]


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()
