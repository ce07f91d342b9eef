"""What a client knows of models: their signatures and labels, read once for each version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellserve import calls
from cellserve.calls import Call
from cellserve.layout import Layout, Outputs, Tensor
from cellserve.numbers import Array
from cellserve.retry import Retry


@dataclass(frozen=True, slots=True)
class Signature:
    """A version of a model, as far as its tensors have to be told apart.

    Attributes:
        model: The model's name.
        version: Its version.
        inputs: In the types that binary frames have.
        outputs: In the model's types.
        states: Their names, and whether they are of integers.
        default_output: Those of `all` time steps or the `last`.
        labels: Of the entries of the (first) output's last axis; empty where they have none.
    """

    model: str
    version: int
    inputs: Layout
    outputs: Layout
    states: Mapping[str, bool]
    default_output: Outputs
    labels: tuple[str, ...]

    def as_wanted(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Makes float32 of integers given by name for what is none of integers: an input (`x`, if alone), a state."""
        names = ["x"] if len(self.inputs.tensors) == 1 else self.inputs.names
        whole = dict(self.states)
        whole |= {name: one.dtype.kind == "i" for name, one in zip(names, self.inputs.tensors, strict=True)}
        return {name: one if whole.get(name, True) else one.astype(np.float32) for name, one in tensors.items()}


class Signatures:
    """The signatures that a client has read.

    Args:
        retry: How a request for one is tried again.
    """

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._known: dict[str, Signature] = {}  # by NAME:VERSION, and by NAME for the version that served it last

    def of(self, model: str, version: int | None = None) -> Call[Signature]:
        """Gives that of a version, or of the newest, or of the one that the name itself says."""
        name = model if version is None else f"{model}:{version}"
        known = self._known.get(name)
        if known is None:
            known = _signature((yield from calls.model(name, self._retry)))
            self._known[name] = self._known[f"{known.model}:{known.version}"] = known
        return known

    def answered(self, asked: str, version: int) -> None:
        """Notes which version has answered to a name: another may have become the newest."""
        known = self._known.get(asked)
        if known is not None and known.version != version:
            self._known.pop(asked, None)

    def has_changed(self, model: str, known: Signature) -> Call[bool]:
        """Asks whether another version is the newest now than the one that was known."""
        if ":" in model:
            return False
        self._known.pop(model, None)
        return (yield from self.of(model)).version != known.version


def _signature(document: Mapping[str, Any]) -> Signature:
    told = document["signature"]
    return Signature(
        document["name"],
        document["version"],
        Layout([_tensor(one, "int32") for one in told["inputs"]]),
        Layout([_tensor(one) for one in told["outputs"]]),
        {one["name"]: one["dtype"] != "float32" for one in told["states"]},
        told["default_output"],
        tuple(document.get("labels") or ()),
    )


def _tensor(told: Mapping[str, Any], whole: str | None = None) -> Tensor:
    dtype = told["dtype"]
    return Tensor(told["name"], np.dtype(dtype if dtype == "float32" else whole or dtype), tuple(told["shape"]))
