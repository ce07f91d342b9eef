"""The client: a Cellserve server from Python, NumPy in and NumPy out, each change applied once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike

from cellserve._async.session import AsyncSession
from cellserve._async.stream import AsyncStream
from cellserve._async.transport import MAX_ANSWER_BYTES, AsyncTransport
from cellserve.errors import CellserveError, InvalidInput
from cellserve.protocol.http import HttpRequest, list_sessions
from cellserve.protocol.predict import Many, One, SequenceBatch, Sequences
from cellserve.protocol.session import SessionRecord, new_id
from cellserve.protocol.tensor_codec import read_safetensors
from cellserve.retry import Retry, Timeout
from cellserve.signatures import Signature
from cellserve.tensors import Array, Outputs, States, TensorLike


class AsyncClient:
    """A client for the tasks of one event loop.

    Args:
        url: URL of the server, or of a load balancer in front of several that share a store.
        api_key: Key to send, if the server requires one.
        timeout: How long one attempt may take; a number is the seconds to wait for an answer.
        retry: How a request without an answer is repeated.
        max_answer_bytes: The largest answer, frame or event that is read; a larger one raises AnswerTooLarge.

    Example:
        ```python
        async with AsyncClient("http://127.0.0.1:8000") as client, client.session("vowels") as session:
            for x in frames:  # [features]
                y = await session.step(x)
        ```
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: Timeout | float | None = None,
        retry: Retry | None = None,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        if not isinstance(timeout, Timeout):
            timeout = Timeout() if timeout is None else Timeout(answer=timeout)
        self._transport = AsyncTransport(url, api_key, timeout, retry or Retry(), max_answer_bytes)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; the sessions stay."""
        await self._transport.close()

    @overload
    async def predict(
        self,
        model: str | None,
        sequences: Array | Mapping[str, ArrayLike],
        outputs: Outputs | None = None,
        states: States | None = None,
        return_states: bool = False,
    ) -> One: ...

    @overload
    async def predict(
        self,
        model: str | None,
        sequences: Sequence[TensorLike],
        outputs: Outputs | None = None,
        states: Sequence[States | None] | None = None,
        return_states: bool = False,
    ) -> Many: ...

    async def predict(
        self,
        model: str | None,
        sequences: Sequences,
        outputs: Outputs | None = None,
        states: States | Sequence[States | None] | None = None,
        return_states: bool = False,
    ) -> Any:
        """Runs a model over whole sequences.

        Args:
            model: `NAME` or `NAME:VERSION`; None if only one model is served.
            sequences: One array `[time, *features]`, or a list of them, which may differ in length. For a model with
                several inputs, a dict of arrays by name in place of each array.
            outputs: `all` time steps or the `last`; None for the model's default.
            states: Initial states `{name: [*shape]}`; for a list of sequences a list with a dict, or None for zeros,
                for each. None for zeros.
            return_states: Whether to return the final states.

        Raises:
            Problem: The server refused, and says why.
            RetriesExhausted: There was no answer.
        """
        batch = SequenceBatch(sequences, states)
        # A model of float32 takes integers too. Only then does the signature matter, since safetensors is typed.
        name = await self._only_model() if model is None and batch.has_integers else model
        while True:
            signature = await self._transport.signature(name) if name is not None and batch.has_integers else None
            try:
                response = await self._transport.send(batch.request(model, outputs, return_states, signature))
                break
            except InvalidInput as error:
                if name is None or signature is None or not await self._has_newer_version(name, signature):
                    raise await self._explained(error, batch, name) from None
        tensors, metadata = read_safetensors(response.content)
        answered, version = metadata["model"], int(metadata["version"])
        self._transport.signatures.forget_if_outdated(model or answered, version)
        state_names = (await self._transport.signature(answered, version)).states if return_states else None
        return batch.split(tensors, answered, version, state_names)

    def session(
        self, model: str, states: States | None = None, session_id: str | None = None, keep: bool = False
    ) -> AsyncSession:
        """Returns a new session; it is created when its `with` block is entered, or at its first use.

        Args:
            model: `NAME`, or `NAME:VERSION`; the session stays on the version that it was created with.
            states: Initial states `{name: [*shape]}`; None for zeros.
            session_id: Id of letters, digits, `-`, `.`, `_` and `~`; None to draw one.
            keep: Whether the session outlives its `with` block.
        """
        return AsyncSession(self._transport, SessionRecord(session_id or new_id(), model, states, keep))

    def attach(self, session_id: str) -> AsyncSession:
        """Returns a session that exists; it continues from its current position and outlives its `with` block."""
        return AsyncSession(self._transport, SessionRecord(session_id, keep=True))

    def stream(self) -> AsyncStream:
        """Returns a stream, which steps many sessions over one socket; it is opened when it is first used."""
        return AsyncStream(self._transport)

    async def sessions(self) -> AsyncIterator[dict[str, Any]]:
        """Iterates over the sessions of the key's owner, page by page: session, model, version, position."""
        after: str | None = None
        while True:
            page = (await self._transport.send(list_sessions(after))).json()
            for session in page["sessions"]:
                yield session
            after = page["next"]
            if after is None:
                return

    async def models(self) -> list[dict[str, Any]]:
        """Lists the models: name, version, description, and the status of each version."""
        models: list[dict[str, Any]] = (await self._transport.send(HttpRequest("GET", "/models"))).json()["models"]
        return models

    async def labels(self, model: str) -> Array:
        """Returns the labels of a model's first output; empty if it has none. They are read once per version.

        Args:
            model: `NAME` or `NAME:VERSION`.

        Returns:
            An array of strings: `labels[y.argmax(-1)]` is the label of the largest entry of each time step.
        """
        return np.array((await self._transport.signature(model)).labels, np.str_)

    async def model(self, name: str) -> dict[str, Any]:
        """Returns the description of a model as `GET /models/{name}` does: signature, labels, metrics, exactness."""
        return await self._transport.describe(name)

    async def ready(self) -> bool:
        """Whether the server accepts requests; asks once."""
        try:
            return (await self._transport.send_once(HttpRequest("GET", "/readyz"))).status == 200
        except CellserveError:
            return False

    async def _explained(self, error: InvalidInput, batch: SequenceBatch, model: str | None) -> InvalidInput:
        """Returns an error that tells of the caller's sequences, if their shapes are what was wrong."""
        name = model or await self._only_model()
        misfit = None if name is None else batch.misfit(await self._transport.signature(name))
        return error if misfit is None else InvalidInput(error.status, misfit, error.type, error.title)

    async def _only_model(self) -> str | None:
        """Returns the name of the model that is served; None if there are several."""
        models = await self.models()
        return models[0]["name"] if len(models) == 1 else None

    async def _has_newer_version(self, model: str, known: Signature) -> bool:
        """Whether a name now stands for another version than the one whose signature is known."""
        if ":" in model:
            return False
        self._transport.signatures.forget(model)
        return (await self._transport.signature(model)).version != known.version
