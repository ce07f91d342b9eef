"""`POST /predict`: whole sequences, each from zeros or from given states."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from cellserve.models.signature import ModelDocument
from cellserve.service.api import safetensors
from cellserve.service.api.asgi import OneATurn, check_json, content_type, read_body, send_body, send_json, unless_gone
from cellserve.service.context import Service
from cellserve.service.engine.engine import Engine
from cellserve.service.errors import BodyTooLarge, InvalidInput, NotFinite, VersionLoading
from cellserve.service.runtime.tensor_layout import parts
from cellserve.service.validation.json_input import PART_BYTES, decode

Array = NDArray[Any]


S = TypeVar("S")


class PredictRequest(msgspec.Struct, Generic[S], forbid_unknown_fields=True):
    """The body of `POST /predict`."""

    sequences: S
    model: str | None = None
    outputs: Literal["last", "all"] | None = None
    states: msgspec.Raw = msgspec.Raw(b"null")
    return_states: bool = False


_decoder = msgspec.json.Decoder(PredictRequest[msgspec.Raw])
_plain_decoder = msgspec.json.Decoder(PredictRequest[list[list[list[float]]]])
_parts_decoder = msgspec.json.Decoder(PredictRequest[list[msgspec.Raw]])

_LARGE_BODY = 256 * 1024  # bytes: beyond them a body is read a little in each turn of the event loop


class Predict:
    """The endpoint, plain ASGI: it is one of the two that carry the load."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._one_a_turn = OneATurn()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, in JSON or in safetensors as it was asked."""
        self.service.owner(scope["headers"])
        kind = content_type(scope)
        if kind in safetensors.MEDIA_TYPES:
            await self._binary(scope, receive, send)
            return
        check_json(kind)
        body = await read_body(scope, receive, self.service.settings.max_body_bytes)
        await self._one_a_turn()
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
        outputs, every_output, final = await self._advance(engine, receive, sequences, states, request)
        answer: dict[str, Any] = {"model": model.name, "version": model.version}
        wanted = outputs if every_output else [y[-1] for y in outputs]
        answer["outputs"] = [model.outputs.named(y) for y in wanted]
        answer |= labelled(model.document, wanted)
        if request.return_states:
            # orjson writes NumPy's numbers, and no arrays without an axis.
            answer["states"] = [{name: s if s.ndim else s[()] for name, s in states.items()} for states in final]
        await send_json(send, answer)

    def _read(self, body: bytes) -> tuple[PredictRequest[Any], Engine, list[Array]]:
        try:
            # What nearly every request is, in one pass; all else, and every error, takes the long way.
            plain = _plain_decoder.decode(body)
            engine = self.service.engine(plain.model)
            if engine.model.reader.plain:
                return plain, engine, engine.model.reader.arrays(plain.sequences)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            pass
        request = decode(_decoder, body)
        engine = self.service.engine(request.model)
        return request, engine, engine.model.reader.sequences(request.sequences)

    async def _read_in_parts(self, body: bytes) -> tuple[PredictRequest[Any], Engine, list[Array]]:
        """Reads a large body: at once it would hold up everybody's steps for 20 ms a megabyte, like this for 3."""
        request = decode(_parts_decoder, body)
        engine = await self.service.engine_when_loaded(request.model)
        sequences: list[Array] = []
        read = 0  # bytes, since others had a turn
        for number, raw in enumerate(request.sequences):
            parts = []
            for part, size in engine.model.reader.in_parts(raw, f"sequences[{number}]"):
                parts.append(part)
                read += size
                if read >= PART_BYTES:
                    read = 0
                    await self._one_a_turn()
            sequences.append(np.concatenate(parts))
        return request, engine, sequences

    async def _binary(self, scope: Scope, receive: Receive, send: Send) -> None:
        options = safetensors.read_options(scope["query_string"])
        body = await read_body(scope, receive, self.service.settings.max_body_bytes)
        await self._one_a_turn()
        engine = await self.service.engine_when_loaded(options.model)
        sequences, states = safetensors.read(body, engine.model)
        outputs, every_output, final = await self._advance(engine, receive, sequences, states, options)
        answer = safetensors.write(engine.model, outputs, every_output, final if options.return_states else None)
        await send_body(send, 200, [(b"content-type", safetensors.MEDIA_TYPES[0])], answer)

    async def _advance(
        self,
        engine: Engine,
        receive: Receive,
        sequences: list[Array],
        states: list[dict[str, Array] | None] | None,
        options: PredictRequest[Any] | safetensors.Options,
    ) -> tuple[list[Array], bool, list[dict[str, Array]]]:
        """Gives the outputs, whether they are those of all time steps, and the last states."""
        limit = self.service.settings.max_sequences
        if len(sequences) > limit:
            raise BodyTooLarge(
                f"sequences: {len(sequences)} of them, a request takes {limit}: send it in parts", limit=limit
            )
        every_output = (options.outputs or engine.model.document.signature.default_output) == "all"
        work = run_sequences(engine, sequences, states, every_output, options.return_states)
        may_wait = engine.is_behind or engine.whole is not None
        outputs, final = await (unless_gone(work, receive) if may_wait else work)
        return outputs, every_output, final


def labelled(document: ModelDocument, outputs: list[Array]) -> dict[str, Any]:
    """Gives `labels`, the name of the largest entry of each (first) output, where the model names them."""
    names = document.labels
    if names is None:
        return {}
    tops = [np.argmax(parts(y)[0], axis=-1) for y in outputs]
    return {"labels": [[names[i] for i in top] if top.ndim else names[int(top)] for top in tops]}


async def run_sequences(
    engine: Engine,
    sequences: list[Array],
    states: list[dict[str, Array] | None] | None,
    every_output: bool,
    return_states: bool,
    name: str = "sequences",
) -> tuple[list[Array], list[dict[str, Array]]]:
    """Gives each sequence a slot for the time of the call, advances all of them, and reads their last states."""
    if engine.whole is not None:
        engine.whole.check(states is not None, return_states)
        return await engine.whole.run(sequences, name), []
    waiting: list[asyncio.Future[Array]] = []
    with engine.scratch([None] * len(sequences) if states is None else states) as slots:
        try:
            for number, sequence in enumerate(sequences):
                waiting.append(engine.submit(slots[number : number + 1], sequence[None], every_output).awaited)
            outputs: list[Array] = []
            for number, done in enumerate(waiting):
                try:
                    outputs.append((await done)[0])
                except NotFinite as problem:
                    place = f"{name}[{number}]"
                    raise NotFinite(f"{place}: {problem.detail}", place=place, **problem.extensions) from None
            return outputs, [engine.arena.read(int(slot)) for slot in slots] if return_states else []
        finally:
            for done in waiting:
                if not done.cancel() and not done.cancelled():
                    done.exception()  # asyncio would log what nobody has looked at
