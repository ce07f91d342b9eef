"""A session as the client knows it: its id, its position, and the calls that change it and say where they start."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from cellserve import rollouts
from cellserve.calls import SAFETENSORS, Call, Reply, Request, exchange, json_request, path_of
from cellserve.errors import SessionGone, UnknownSession
from cellserve.layout import Given, Outputs, Tensors, listed
from cellserve.numbers import Array, body_of, float32, has_integers, tensors_of, y_of
from cellserve.predictions import States
from cellserve.retry import ONCE, Retry
from cellserve.rollouts import Rollout
from cellserve.signatures import Signature, Signatures


class State(dict[str, Array]):
    """A session's state: an array `[*shape]` by each state's name.

    Attributes:
        metadata: model, version, digest and position, as the server tells them. With them a state goes back into
            sessions of the same model only; a plain dict goes into any that its shapes fit.
    """

    def __init__(self, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def new_id() -> str:
    """Draws an id: 128 random bits."""
    return secrets.token_hex(16)


class SessionCalls:
    """One session, without the doing.

    Args:
        retry: How its requests are tried again.
        signatures: Of the client.
        session_id: Its id.
        model: To create it of, at its first use; None where it exists.
        states: To begin from; None for zeros.
        keep: Whether it outlives its `with` block.
        position: Where it is, as far as is known.
        version: Of its model, as far as is known.
    """

    def __init__(
        self,
        retry: Retry,
        signatures: Signatures,
        session_id: str,
        model: str | None = None,
        states: States | None = None,
        keep: bool = False,
        position: int | None = None,
        version: int | None = None,
    ) -> None:
        self.id = session_id
        self.model = model
        self.version = version
        self.keep = keep
        self.busy = False
        self._retry = retry
        self._signatures = signatures
        self._states = states
        self._position = position
        self._siblings: dict[str, SessionCalls] = {}  # of the stream that is to delete it in the end
        self._handle: tuple[object, int] = None, 0  # the socket that it is attached on, and its number there

    @property
    def position(self) -> int:
        """Where it is, as far as has been acknowledged: what changed it, steps by their number, all else by one."""
        return self._position or 0

    def opened(self) -> Call[None]:
        """Creates it, or asks where it is, where neither has been done."""
        if self._position is not None:
            return
        if self.model is None:
            yield from self.refreshed()
            return
        document: dict[str, Any] = {"model": self.model}
        if self._states is not None:
            document["states"] = listed(self._states)
        reply = yield from self._exchange(json_request("PUT", self._path(), document))
        asked, self._states = self.model, None
        self._told(reply)
        assert self.version is not None
        self._signatures.answered(asked, self.version)

    def refreshed(self) -> Call[int]:
        """Asks where it is."""
        return self._told((yield from self._exchange(Request("GET", self._path()))))

    def stepped(self, x: Given, outputs: Outputs | None) -> Call[Tensors]:
        """Steps it."""
        yield from self.opened()
        document: dict[str, Any] = {"x": listed(x), "position": self.position}
        if outputs is not None:
            document["outputs"] = outputs
        reply = yield from self._exchange(json_request("POST", self._path("step"), document))
        y = y_of(reply.content)
        self._told(reply)
        if has_integers(y if isinstance(y, dict) else {"y": y}):  # of 32 or 64 bits
            return (yield from self.signature()).outputs.typed(y)
        return y

    def signature(self) -> Call[Signature]:
        """Gives its model's signature."""
        yield from self.opened()
        assert self.model is not None
        return (yield from self._signatures.of(self.model, self.version))

    def rolled_out(self, document: dict[str, Any]) -> Call[Rollout]:
        """Lets it go on by itself."""
        yield from self.opened()
        asked = json_request("POST", self._path("rollout"), {**document, "position": self.position})
        reply = yield from self._exchange(asked)
        rollout = rollouts.read(reply)
        self._told(reply)
        return rollout

    def was_reset(self) -> Call[None]:
        """Sets its state to zeros."""
        yield from self.opened()
        self._told((yield from self._exchange(json_request("POST", self._path("reset"), {"position": self.position}))))

    def forked(self) -> Call[tuple[str, int]]:
        """Makes another session of its state, of the same version; gives that one's id and position."""
        yield from self.opened()
        document = {"session": new_id(), "position": self.position}
        reply = (yield from self._exchange(json_request("POST", self._path("fork"), document))).json()
        return reply["session"], reply["position"]

    def state_read(self) -> Call[State]:
        """Downloads its state."""
        yield from self.opened()
        reply = yield from self._exchange(Request("GET", self._path("state")))
        return State(*tensors_of(reply.content))

    def state_set(self, state: States) -> Call[None]:
        """Uploads a state."""
        yield from self.opened()
        metadata = state.metadata if isinstance(state, State) else None
        tensors = {name: float32(tensor) for name, tensor in state.items()}
        if has_integers(tensors):
            tensors = (yield from self.signature()).as_wanted(tensors)
        body = body_of(tensors, metadata)
        params = {"position": str(self.position)}
        self._told((yield from self._exchange(Request("PUT", self._path("state"), body, SAFETENSORS, params))))

    def deleted(self, retry: Retry | None = None) -> Call[None]:
        """Deletes it."""
        if self._position is None and self.model is not None:
            return  # it has never been made
        yield from exchange(Request("DELETE", self._path()), retry or self._retry)
        self._siblings.pop(self.id, None)

    def left(self, failed: bool) -> Call[None]:
        """Deletes it at the end of its `with` block; where an error ended that, no other error hides it."""
        if self.keep:
            return
        try:
            yield from self.deleted(ONCE if failed else None)
        except (SessionGone, UnknownSession):
            pass  # it is not there, as was wanted
        except Exception:
            if not failed:
                raise

    def _attached(self, link: object, told: Mapping[str, Any]) -> None:
        """Notes its handle on a socket; its position only where none has been acknowledged yet."""
        self._handle = link, told["handle"]
        self.model, self.version = told["model"], told["version"]
        if self._position is None:
            self._position, self._states = told["position"], None

    def _path(self, *parts: str) -> str:
        return path_of("sessions", self.id, *parts)

    def _exchange(self, request: Request) -> Call[Reply]:
        return exchange(request, self._retry)

    def _told(self, reply: Reply) -> int:
        document = reply.json()
        self.model, self.version = document.get("model", self.model), document.get("version", self.version)
        self._position = int(document["position"])
        return self._position
