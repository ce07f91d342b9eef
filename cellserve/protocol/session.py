"""What the client knows of a session, and the requests that change it from a known position."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cellserve.protocol.frames import Frame, text_frame
from cellserve.protocol.http import SAFETENSORS, HttpRequest, json_request, path_of
from cellserve.protocol.tensor_codec import write_safetensors
from cellserve.tensors import Array, States, to_json


class State(dict[str, Array]):
    """A session's state, `{name: [*shape]}`.

    Attributes:
        metadata: Model, version, digest and position, as sent by the server. A state with metadata can only be set in
            sessions of the same model; a plain dict in any session whose shapes it fits.
    """

    def __init__(self, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def new_id() -> str:
    """Draws an id of 128 random bits."""
    return secrets.token_hex(16)


@dataclass(slots=True)
class SessionRecord:
    """What the client knows of one session.

    Args:
        id: Id of the session.
        model: Model to create it with; None to use a session that exists.
        states: Initial states to create it with; None for zeros.
        keep: Whether the session outlives its `with` block.
        position: Last acknowledged position; None before the session was created or looked up.
        version: Version of the model, once known.
    """

    id: str = field(default_factory=new_id)
    model: str | None = None
    states: States | None = None
    keep: bool = False
    position: int | None = None
    version: int | None = None
    locked: bool = False  # a request on this session is under way
    socket: object = None  # the socket on which `handle` is valid
    handle: int = 0

    @property
    def exists(self) -> bool:
        """Whether the server has this session, as far as known."""
        return self.position is not None or self.model is None

    def path(self, *parts: str) -> str:
        """Returns the path of the session, or of something below it."""
        return path_of("sessions", self.id, *parts)

    def open_request(self) -> HttpRequest:
        """Returns the request that creates the session, or reads its position if it exists."""
        if self.model is None:
            return self.read_request()
        states = {} if self.states is None else {"states": to_json(self.states)}
        return json_request("PUT", self.path(), {"model": self.model, **states})

    def read_request(self) -> HttpRequest:
        """Returns the request that reads the session's position."""
        return HttpRequest("GET", self.path())

    def change_request(self, change: str, document: Mapping[str, Any]) -> HttpRequest:
        """Returns the request for a change from the current position: `step`, `rollout`, `reset` or `fork`."""
        return json_request("POST", self.path(change), {**document, "position": self.position})

    def set_state_request(self, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None) -> HttpRequest:
        """Returns the request that uploads a state."""
        body = write_safetensors(tensors, metadata)
        return HttpRequest("PUT", self.path("state"), body, SAFETENSORS, {"position": str(self.position)})

    def open_frame(self) -> Frame:
        """Returns the frame that creates the session, or attaches it if it exists."""
        if self.exists:
            return text_frame(op="attach", session=self.id)
        states = None if self.states is None else to_json(self.states)
        return text_frame(op="open", session=self.id, model=self.model, states=states)

    def update(self, document: Mapping[str, Any]) -> None:
        """Takes over model, version and position from the answer to a request."""
        self.model, self.version = document.get("model", self.model), document.get("version", self.version)
        self.position, self.states = int(document["position"]), None

    def attach(self, socket: object, document: Mapping[str, Any]) -> None:
        """Takes over the handle on a socket. An acknowledged position stays, so that a step is repeated from there."""
        self.socket, self.handle = socket, document["handle"]
        self.model, self.version = document["model"], document["version"]
        if self.position is None:
            self.position, self.states = document["position"], None
