"""The Open Inference Protocol in JSON as a load, for any server that speaks it: Triton, KServe's, Cellserve's `/v2`.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_sequence.md
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cellserve.benchmark.inputs import Input
from cellserve.benchmark.plan import Body, Client
from cellserve.benchmark.surfaces import JSON, Load, Steps, draw_bodies
from cellserve.benchmark.target import BenchFailed, Target, content
from cellserve.protocol.http import path_of

_DTYPES = {
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
_SEQUENCE_IDS = range(10**14, 9 * 10**14)  # of the same number of digits, so that bodies are of the same length


class InferenceProtocol:
    """The surfaces of a model behind `/v2`.

    Args:
        target: The server.
        name: `NAME` or `NAME:VERSION`.
        steps: Time steps of a whole sequence, where the metadata leave the second axis open.
        shapes: Shapes of inputs, by name, where the metadata leave more open.

    Raises:
        BenchFailed: There is no such model, or no data can be drawn for it.
    """

    def __init__(self, target: Target, name: str, steps: Steps, shapes: Mapping[str, Sequence[int]]) -> None:
        base, _, version = name.partition(":")
        path = path_of("v2", "models", base) + (path_of("versions", version) if version else "")
        metadata = target.ask_json(path)
        self._config = target.model_config(path)
        self._steps, self._shapes = steps, shapes
        try:
            self._inputs: list[dict[str, Any]] = metadata["inputs"]
            versions = metadata.get("versions") or [""]
            names = [one["name"] for one in self._inputs]
            unknown = [one["datatype"] for one in self._inputs if one["datatype"] not in _DTYPES]
        except (KeyError, TypeError, AttributeError):
            raise BenchFailed(f"{target.url}{path}: this is not the metadata of a model") from None
        if unknown:
            raise BenchFailed(f"{name} takes {unknown[0]}: random data can be drawn for {', '.join(_DTYPES)} only")
        for given in shapes:
            if given not in names:
                raise BenchFailed(f"--shape: {name} has no input {given!r}: choose from {', '.join(names)}")
        self.name, self.version = base, version or str(versions[-1])
        self.described: Mapping[str, Any] = {}
        self.max_batch: int | None = self._config.get("max_batch_size")
        self._target, self._path = target, f"{path}/infer"
        self._rng = np.random.default_rng(0)

    @property
    def surfaces(self) -> Mapping[str, Callable[[int, int], Load]]:
        """The loads by name, each a function of the number of sequences or clients."""
        return {"sequences": self.sequences, "stateless": self.stateless}

    @property
    def default_surfaces(self) -> list[str]:
        """Sequences if the model's configuration speaks of them."""
        return ["sequences" if "sequence_batching" in self._config else "stateless"]

    def sequences(self, sequences: int, sockets: int) -> Load:
        """Returns clients with a sequence each that send one step after the other."""

        def infer(inputs: str, sequence: int, start: bool, end: bool) -> bytes:
            flags = f'"sequence_start":{str(start).lower()},"sequence_end":{str(end).lower()}'
            return f'{{"inputs":{inputs},"parameters":{{{flags},"sequence_id":{sequence}}}}}'.encode()

        head, x = self._target.head("POST", self._path, JSON), json.dumps(self._draw(1))
        clients, first = [], secrets.choice(_SEQUENCE_IDS)
        for sequence in range(first, first + sequences):
            started, ended = (head + content(infer(x, sequence, start, not start)) for start in (True, False))
            clients.append(Client((started,), head, f"{sequence}}}}}".encode(), (ended,)))
        digits = len(f"{first}}}}}")

        def body() -> Body:
            step = content(infer(json.dumps(self._draw(1)), first, False, False))
            return Body(step[:-digits], 1)

        return Load(clients, draw_bodies(body))

    def stateless(self, clients: int, sockets: int) -> Load:
        """Returns clients that send one request after the other without a sequence."""

        def body() -> Body:
            time = self._steps.draw(self._rng)
            inputs = self._draw(time)
            shape = inputs[0]["shape"]
            has_time = len(self._inputs[0]["shape"]) > 1 and self._inputs[0]["shape"][1] == -1
            return Body(content(json.dumps({"inputs": inputs}).encode()), shape[0] * (shape[1] if has_time else 1))

        return Load([Client(prefix=self._target.head("POST", self._path, JSON))] * clients, draw_bodies(body))

    def _draw(self, time: int) -> list[dict[str, Any]]:
        """Returns random tensors for one request: a batch of one, of so many time steps where that is open."""
        return [self._tensor(one, time) for one in self._inputs]

    def _tensor(self, described: Mapping[str, Any], time: int) -> dict[str, Any]:
        name, shape = described["name"], list(described["shape"])
        if name in self._shapes:
            shape = list(self._shapes[name])
        else:
            for axis, size in enumerate((1, time)[: len(shape)]):
                shape[axis] = size if shape[axis] == -1 else shape[axis]
        if -1 in shape:
            raise BenchFailed(f"{name} is {described['shape']}: say which sizes with --shape {name}:1,50,16")
        values = Input(name, _DTYPES[described["datatype"]], (math.prod(shape),)).draw(self._rng)
        return {"name": name, "shape": shape, "datatype": described["datatype"], "data": values.tolist()}
