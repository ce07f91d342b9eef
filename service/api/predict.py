"""`POST /predict`: runs whole sequences, each from zeros or from given states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from cellserve.service.api import safetensors
from cellserve.service.api.answer_size import LARGE, check_binary_answer, check_json_answer
from cellserve.service.api.asgi import cancel_on_disconnect, check_json, content_type, read_body, send_body, send_parts
from cellserve.service.api.json_parts import send_sized_json
from cellserve.service.api.predict_codec import parse_prediction, prediction_json, wants_every_output
from cellserve.service.api.step_codec import NOT_SIMPLE
from cellserve.service.context import ServiceContext
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import Problem
from cellserve.service.model_repository.model import Model
from cellserve.service.sessions.session import current_client
from cellserve.service.validation.json_bodies import LEFT_OUT, Outputs, model_of_prediction, read_prediction

Array = NDArray[Any]


_LARGEST_SIMPLE = 128 * 1024  # bytes; up to here parsing takes less than a millisecond


class Wanted(NamedTuple):
    """What a prediction asks for beside its sequences."""

    states: list[dict[str, Array] | None] | None  # to start from
    outputs: Outputs | None
    return_states: bool


class Predict:
    """The endpoint, plain ASGI for speed.

    Args:
        service: The service.
    """

    def __init__(self, service: ServiceContext) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request in its own format, JSON or safetensors."""
        client = current_client(self.service.owner(scope["headers"], scope["client"]))
        kind = content_type(scope)
        if kind in safetensors.MEDIA_TYPES:
            await self._binary(client, scope, receive, send)
            return
        check_json(kind)
        body = await read_body(scope, receive, self.service.settings.max_body_bytes)
        engine, wanted, sequences = await self._read(client, body)
        size = self._check_size(check_json_answer, engine.model, sequences, wanted)
        outputs, every_output, final = await self._advance(client, engine, receive, sequences, wanted)
        answer = prediction_json(engine.model, outputs, every_output, final if wanted.return_states else None)
        await send_sized_json(send, receive, answer, size)

    async def _read(self, client: str, body: bytes) -> tuple[Engine, Wanted, Sequence[Array]]:
        if len(body) <= _LARGEST_SIMPLE:
            await self.service.decoding.admission()
            try:
                # Most requests are read in this single pass; the general path below handles the others and all errors.
                plain = parse_prediction(body)
                engine = self.service.engine(plain.model)
                most = self.service.settings.max_sequences
                sequences = engine.model.reader.plain_sequences(plain.sequences, most)
                if sequences and plain.states == LEFT_OUT:
                    return engine, Wanted(None, plain.outputs, plain.return_states), sequences
            except (*NOT_SIMPLE, Problem):
                pass
        decoding = self.service.decoding
        engine = await self.service.engine_when_loaded(await decoding.read(client, model_of_prediction, body=body))
        reader, most = engine.model.reader, self.service.settings.max_sequences
        prediction = await decoding.read(client, read_prediction, reader, most, body=body)
        wanted = Wanted(prediction.states, prediction.outputs, prediction.return_states)
        return engine, wanted, prediction.sequences

    async def _binary(self, client: str, scope: Scope, receive: Receive, send: Send) -> None:
        options = safetensors.read_options(scope["query_string"])
        body = await read_body(scope, receive, self.service.settings.max_body_bytes)
        await self.service.decoding.admission()
        engine = await self.service.engine_when_loaded(options.model)
        sequences, states = safetensors.read(body, engine.model, self.service.settings.max_sequences)
        wanted = Wanted(states, options.outputs, options.return_states)
        size = self._check_size(check_binary_answer, engine.model, sequences, wanted)
        outputs, every_output, final = await self._advance(client, engine, receive, sequences, wanted)
        write = safetensors.write if size <= LARGE else safetensors.write_parts
        answer = write(engine.model, outputs, every_output, final if options.return_states else None)
        headers = [(b"content-type", safetensors.MEDIA_TYPES[0])]
        if isinstance(answer, bytes):
            await send_body(send, 200, headers, answer)
        else:
            await send_parts(send, receive, headers, answer)

    def _check_size(
        self,
        check: Callable[[int, Model, Sequence[Array], int, int], int],
        model: Model,
        sequences: Sequence[Array],
        wanted: Wanted,
    ) -> int:
        """Returns the size of the answer, before the work; raises BodyTooLarge."""
        every_output = wants_every_output(model, wanted.outputs)
        steps = sum(map(len, sequences)) if every_output else len(sequences)
        states = len(sequences) if wanted.return_states else 0
        return check(self.service.settings.max_exchange_bytes, model, sequences, steps, states)

    async def _advance(
        self, client: str, engine: Engine, receive: Receive, sequences: Sequence[Array], wanted: Wanted
    ) -> tuple[list[Array], bool, list[dict[str, Array]]]:
        """Returns the outputs, whether they are of all time steps, and the final states."""
        every_output = wants_every_output(engine.model, wanted.outputs)
        runner = engine.sequences
        work = runner.run(sequences, wanted.states, every_output, wanted.return_states, "sequences", client)
        outputs, final = await (cancel_on_disconnect(work, receive) if runner.may_wait(sequences) else work)
        return outputs, every_output, final
