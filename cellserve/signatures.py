"""Signatures of models, as far as the client needs them, cached per version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellserve.tensors import Array, FrameLayout, Outputs, TensorSpec


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors of one version of a model.

    Attributes:
        model: Name of the model.
        version: Version of the model.
        inputs: Layout in the types of binary frames.
        outputs: Layout in the model's own types.
        states: `{name: whether the state holds integers}`.
        default_output: Which outputs a request without `outputs` gets.
        labels: Names along the last axis of the first output; empty if the model has none.
    """

    model: str
    version: int
    inputs: FrameLayout
    outputs: FrameLayout
    states: Mapping[str, bool]
    default_output: Outputs
    labels: tuple[str, ...]

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Signature:
        """Reads the answer to `GET /models/{name}`."""
        signature = document["signature"]
        return cls(
            document["name"],
            document["version"],
            FrameLayout([_tensor(one, "int32") for one in signature["inputs"]]),
            FrameLayout([_tensor(one) for one in signature["outputs"]]),
            {one["name"]: one["dtype"] != "float32" for one in signature["states"]},
            signature["default_output"],
            tuple(document.get("labels") or ()),
        )

    def sequence_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of a time step of each input by name; a single input is named `x`."""
        names = ["x"] if len(self.inputs.tensors) == 1 else self.inputs.names
        return {name: tensor.shape for name, tensor in zip(names, self.inputs.tensors, strict=True)}

    def cast_to_signature(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Casts named integer arrays to float32 where the signature is float. A single input is named `x`."""
        names = ["x"] if len(self.inputs.tensors) == 1 else self.inputs.names
        integer = dict(self.states)
        integer |= {name: one.dtype.kind == "i" for name, one in zip(names, self.inputs.tensors, strict=True)}
        return {name: one if integer.get(name, True) else one.astype(np.float32) for name, one in tensors.items()}


class SignatureCache:
    """The signatures that a client has read, by `NAME:VERSION`, and by `NAME` for the newest version seen."""

    def __init__(self) -> None:
        self._known: dict[str, Signature] = {}

    def get(self, name: str) -> Signature | None:
        """Returns what is known under `NAME` or `NAME:VERSION`."""
        return self._known.get(name)

    def remember(self, name: str, signature: Signature) -> None:
        """Stores a signature under the name it was asked for by, and under its version."""
        self._known[name] = self._known[f"{signature.model}:{signature.version}"] = signature

    def forget(self, name: str) -> None:
        """Makes the next request under this name read the signature again."""
        self._known.pop(name, None)

    def forget_if_outdated(self, name: str, version: int) -> None:
        """Forgets the signature under a name for which another version has just answered."""
        known = self._known.get(name)
        if known is not None and known.version != version:
            self.forget(name)


def _tensor(document: Mapping[str, Any], integer_type: str | None = None) -> TensorSpec:
    dtype = document["dtype"]
    return TensorSpec(
        document["name"], np.dtype(dtype if dtype == "float32" else integer_type or dtype), tuple(document["shape"])
    )
