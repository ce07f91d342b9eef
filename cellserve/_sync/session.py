# Generated from _async/session.py by scripts/unasync.py: edit that file.
"""A session: a recurrent state on the server, stepped over HTTP."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from cellserve._sync.rollout_stream import RolloutStream
from cellserve._sync.transport import Transport
from cellserve.errors import SessionGone, UnknownSession
from cellserve.protocol.http import HttpRequest, HttpResponse
from cellserve.protocol.rollout import Rollout, read_rollout, request_body
from cellserve.protocol.session import SessionRecord, State, new_id
from cellserve.protocol.tensor_codec import read_safetensors, read_y
from cellserve.retry import ONCE, Retry
from cellserve.tensors import Outputs, States, TensorLike, Tensors, has_integers, to_json, to_tensor


class Session:
    """A session of an `Client`; get one from `Client.session` or `Client.attach`.

    Every change carries the position that it starts from and is repeated until it is answered, so that it is applied
    once whatever was lost on the way. Threads that share a session take turns. The end of a `with` block deletes the
    session, unless `keep` is set. Every method raises CellserveError: RetriesExhausted if there was no answer, a
    Problem if the server refused.

    Args:
        transport: Transport of the client.
        record: What is known of the session.
    """

    def __init__(self, transport: Transport, record: SessionRecord) -> None:
        self._transport = transport
        self._record = record

    @property
    def id(self) -> str:
        """Id of the session."""
        return self._record.id

    @property
    def model(self) -> str | None:
        """Name of its model; None until it is known."""
        return self._record.model

    @property
    def version(self) -> int | None:
        """Version of its model; None until it is known."""
        return self._record.version

    @property
    def position(self) -> int:
        """Last acknowledged position: each time step counts one, each other change counts one."""
        return self._record.position or 0

    @property
    def keep(self) -> bool:
        """Whether the session outlives its `with` block."""
        return self._record.keep

    @keep.setter
    def keep(self, keep: bool) -> None:
        self._record.keep = keep

    def __enter__(self) -> Self:
        with self._lock():
            self._transport.open(self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.keep:
            return
        try:
            with self._lock():
                self._delete(self._transport.retry if kind is None else ONCE)
        except (SessionGone, UnknownSession):
            pass
        except Exception:
            if kind is None:  # otherwise the error that ended the block is raised
                raise

    def step(self, x: TensorLike, outputs: Outputs | None = None) -> Tensors:
        """Steps the session by one time step or several.

        Args:
            x: `[*features]`, or `[time, *features]`; several inputs as a dict by name. For a model that takes one
                integer, 5 is one time step and [5, 6] are two.
            outputs: `all` or the `last` of several time steps; None for the model's default.

        Returns:
            y in the model's type (mostly float32): `[*outputs]`, or `[time, *outputs]` for all time steps. Several
            outputs are a dict by name.
        """
        with self._lock():
            document = {"x": to_json(x)} | ({} if outputs is None else {"outputs": outputs})
            response = self._change("step", document)
            y = read_y(response.content)
            self._record.update(response.json())
            if has_integers(y if isinstance(y, dict) else {"y": y}):  # JSON does not tell int32 from int64
                assert self.model is not None
                return self._transport.signature(self.model, self.version).outputs.cast(y)
            return y

    def rollout(
        self,
        begin: str | TensorLike,
        steps: int,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Rollout:
        """Generates autoregressively: each output is the session's next input.

        Args:
            begin: First input, `[*features]` or `[time, *features]`; or a text, if the symbols are characters.
            steps: Number of outputs. The session does not read the last one: to continue, begin with it.
            temperature: Sampling temperature: below 1 favours probable symbols, 0 always takes the most probable.
            top_k: Sample from this many of the most probable symbols only.
            seed: Seed of the sampling; equal seeds give equal results.
        """
        with self._lock():
            response = self._change("rollout", request_body(begin, steps, temperature, top_k, seed))
            rollout = read_rollout(response)
            self._record.update(response.json())
            return rollout

    def rollout_stream(
        self,
        begin: str | TensorLike,
        steps: int,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> RolloutStream:
        """Generates like `rollout`, and delivers each output as soon as it is applied.

        A lost connection is reopened and resumed: every output is delivered once. If you stop before the end, call
        `refresh` for the session's position. The server stops once it notices that nobody reads; until then a change
        may raise PositionConflict.

        Example:
            ```python
            with session.rollout_stream("Alice was ", 100, seed=1) as letters:
                for one in letters:
                    print(one.label, end="")
            ```
        """
        document = request_body(begin, steps, temperature, top_k, seed)
        return RolloutStream(self._transport, self._record, document)

    def reset(self) -> None:
        """Sets the state to zeros; the position grows by one."""
        with self._lock():
            self._record.update(self._change("reset").json())

    def fork(self, keep: bool = False) -> Session:
        """Creates another session with the same state and position."""
        with self._lock():
            copy = self._change("fork", {"session": new_id()}).json()
        record = SessionRecord(copy["session"], self.model, None, keep, copy["position"], self.version)
        return Session(self._transport, record)

    def state(self) -> State:
        """Downloads the state."""
        with self._lock():
            self._transport.open(self._record)
            response = self._transport.send(HttpRequest("GET", self._record.path("state")))
            return State(*read_safetensors(response.content))

    def set_state(self, state: States) -> None:
        """Sets the state, `{name: [*shape]}`; the position grows by one."""
        with self._lock():
            self._transport.open(self._record)
            tensors = {name: to_tensor(tensor) for name, tensor in state.items()}
            if has_integers(tensors):
                assert self.model is not None
                tensors = self._transport.signature(self.model, self.version).cast_to_signature(tensors)
            metadata = state.metadata if isinstance(state, State) else None
            response = self._transport.send(self._record.set_state_request(tensors, metadata))
            self._record.update(response.json())

    def refresh(self) -> int:
        """Reads the position from the server, after RetriesExhausted or when others change the session too."""
        with self._lock():
            self._record.update(self._transport.send(self._record.read_request()).json())
            return self.position

    def delete(self) -> None:
        """Deletes the session."""
        with self._lock():
            self._delete(self._transport.retry)

    def _lock(self) -> AbstractContextManager[None]:
        return self._transport.locks.hold((self._record,))

    def _change(self, change: str, document: dict[str, Any] | None = None) -> HttpResponse:
        self._transport.open(self._record)
        return self._transport.send(self._record.change_request(change, document or {}))

    def _delete(self, retry: Retry) -> None:
        if self._record.exists:
            self._transport.send(HttpRequest("DELETE", self._record.path()), retry)
