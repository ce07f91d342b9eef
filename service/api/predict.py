"""`POST /predict`: runs whole sequences, each from zeros or from given states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from cellserve.service.api import safetensors
from cellserve.service.api.answer_size import LARGE, check_binary_answer, check_json_answer
from cellserve.service.api.asgi import (
    OnePerLoopIteration,
    cancel_on_disconnect,
    check_json,
    content_type,
    read_body,
    send_body,
    send_parts,
)
from cellserve.service.api.json_parts import send_sized_json
from cellserve.service.api.predict_codec import (
    PredictRequest,
    parse_simple_prediction,
    prediction_json,
    read_prediction,
    read_prediction_in_parts,
    wants_every_output,
)
from cellserve.service.api.step_codec import NOT_SIMPLE
from cellserve.service.context import ServiceContext
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import BodyTooLarge, InvalidInput, VersionLoading
from cellserve.service.model_repository.model import Model
from cellserve.service.sessions.session import current_client
from cellserve.service.validation.json_input import PART_BYTES

Array = NDArray[Any]


_LARGE_BODY = 256 * 1024  # bytes; larger bodies are parsed in parts, one per loop iteration


class Predict:
    """The endpoint, plain ASGI for speed.

    Args:
        service: The service.
        one_per_iteration: Admits bodies to be read, those of the fast path too.
    """

    def __init__(self, service: ServiceContext, one_per_iteration: OnePerLoopIteration) -> None:
        self.service = service
        self._one_per_iteration = one_per_iteration

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request in its own format, JSON or safetensors."""
        owner = self.service.owner(scope["headers"], scope["client"])
        kind = content_type(scope)
        if kind in safetensors.MEDIA_TYPES:
            await self._binary(owner, scope, receive, send)
            return
        check_json(kind)
        body = await read_body(scope, receive, self.service.settings.max_body_bytes)
        await self._one_per_iteration()
        if len(body) > _LARGE_BODY:
            request, engine, sequences = await self._read_in_parts(body)
        else:
            try:
                request, engine, sequences = self._read(body)
            except VersionLoading as loading:
                await self.service.versions.loading(loading.key)
                request, engine, sequences = self._read(body)
        model = engine.model
        if not sequences:
            raise InvalidInput("sequences: empty: send at least one sequence", place="sequences")
        states = None
        if bytes(request.states) != b"null":
            states = model.reader.states(request.states, len(sequences))
        size = self._check_size(check_json_answer, model, sequences, request)
        outputs, every_output, final = await self._advance(owner, engine, receive, sequences, states, request)
        answer = prediction_json(model, outputs, every_output, final if request.return_states else None)
        await send_sized_json(send, receive, answer, size)

    def _read(self, body: bytes) -> tuple[PredictRequest[Any], Engine, list[Array]]:
        try:
            # Most requests parse in this single pass; the general path below handles the others and all errors.
            plain = parse_simple_prediction(body)
            engine = self.service.engine(plain.model)
            if engine.model.reader.plain:
                return plain, engine, engine.model.reader.arrays(plain.sequences)
        except NOT_SIMPLE:
            pass
        request = read_prediction(body)
        engine = self.service.engine(request.model)
        return request, engine, engine.model.reader.sequences(request.sequences)

    async def _read_in_parts(self, body: bytes) -> tuple[PredictRequest[Any], Engine, list[Array]]:
        """Parses a large body in parts: it blocks the event loop 3 ms per MB, at once 20 ms per MB."""
        request = read_prediction_in_parts(body)
        engine = await self.service.engine_when_loaded(request.model)
        sequences: list[Array] = []
        read = 0  # bytes since the last yield to the event loop
        for number, raw in enumerate(request.sequences):
            parts = []
            for part, size in engine.model.reader.in_parts(raw, f"sequences[{number}]"):
                parts.append(part)
                read += size
                if read >= PART_BYTES:
                    read = 0
                    await self._one_per_iteration()
            sequences.append(np.concatenate(parts))
        return request, engine, sequences

    async def _binary(self, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        options = safetensors.read_options(scope["query_string"])
        body = await read_body(scope, receive, self.service.settings.max_body_bytes)
        await self._one_per_iteration()
        engine = await self.service.engine_when_loaded(options.model)
        sequences, states = safetensors.read(body, engine.model)
        size = self._check_size(check_binary_answer, engine.model, sequences, options)
        outputs, every_output, final = await self._advance(owner, engine, receive, sequences, states, options)
        write = safetensors.write if size <= LARGE else safetensors.write_parts
        answer = write(engine.model, outputs, every_output, final if options.return_states else None)
        headers = [(b"content-type", safetensors.MEDIA_TYPES[0])]
        if isinstance(answer, bytes):
            await send_body(send, 200, headers, answer)
        else:
            await send_parts(send, receive, headers, answer)

    def _check_size(
        self,
        check: Callable[[int, Model, list[Array], int, int], int],
        model: Model,
        sequences: list[Array],
        options: PredictRequest[Any] | safetensors.Options,
    ) -> int:
        """Returns the size of the answer, before the work; raises BodyTooLarge."""
        every_output = wants_every_output(model, options.outputs)
        steps = sum(map(len, sequences)) if every_output else len(sequences)
        states = len(sequences) if options.return_states else 0
        return check(self.service.settings.max_exchange_bytes, model, sequences, steps, states)

    async def _advance(
        self,
        owner: str,
        engine: Engine,
        receive: Receive,
        sequences: list[Array],
        states: list[dict[str, Array] | None] | None,
        options: PredictRequest[Any] | safetensors.Options,
    ) -> tuple[list[Array], bool, list[dict[str, Array]]]:
        """Returns the outputs, whether they are of all time steps, and the final states."""
        limit = self.service.settings.max_sequences
        if len(sequences) > limit:
            raise BodyTooLarge(
                f"sequences: a request may have {limit}, got {len(sequences)}: split it into several requests",
                limit=limit,
            )
        every_output = wants_every_output(engine.model, options.outputs)
        runner = engine.sequences
        client = current_client(owner)
        work = runner.run(sequences, states, every_output, options.return_states, "sequences", client)
        outputs, final = await (cancel_on_disconnect(work, receive) if runner.may_wait(sequences) else work)
        return outputs, every_output, final
