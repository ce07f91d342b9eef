"""A repository of small models of every kind of signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from cellserve.export.publish import repository_writer
from cellserve.models.signature import MODEL_NAME, Signature, StateSpec, TensorSpec
from cellserve.service.runtime.tensor_layout import unpack
from tests import foreign


def signature(**more: Any) -> Signature:
    return Signature(lengths=None, time_axis=False, **more)


S = StateSpec(name="s", next_name="s.next", shape=(4,))
FRAMES = signature(inputs=(TensorSpec(name="x", shape=(3,)),), outputs=(TensorSpec(name="y", shape=(2,)),), states=(S,))
LETTERS = signature(
    inputs=(TensorSpec(name="ids", dtype="int32", shape=(), bounds=(0, 6)),),
    outputs=(TensorSpec(name="y", shape=(7,)),),
    states=(S,),
)
SYMBOLS = signature(
    inputs=(TensorSpec(name="symbol", dtype="int64", shape=(), bounds=(0, 6)), TensorSpec(name="level", shape=(2,))),
    outputs=(TensorSpec(name="features", shape=(4,)), TensorSpec(name="top", dtype="int64", shape=())),
    states=(S,),
)
DEEP = signature(
    inputs=(TensorSpec(name="input", shape=(3,)),),
    outputs=(TensorSpec(name="output", shape=(4,)),),
    states=(StateSpec(name="state", next_name="stateN", shape=(2, 4), batch_axis=1),),
)
LSTM = Signature(
    inputs=(TensorSpec(name="x", shape=(3,)),),
    outputs=(TensorSpec(name="out", shape=(4,)),),
    states=tuple(StateSpec(name=name, next_name=f"{name}n", shape=(1, 4), batch_axis=1) for name in "hc"),
    lengths=None,
)
BOTH_WAYS = Signature(
    inputs=(TensorSpec(name="x", shape=(3,)),),
    outputs=(TensorSpec(name="y", shape=(8,)),),
    states=(),
    lengths=None,
    predict_only="its LSTM is bidirectional",
    min_steps=2,
)
COUNTING = signature(
    inputs=(TensorSpec(name="x", shape=()),),
    outputs=(TensorSpec(name="y", shape=()),),
    states=(StateSpec(name="n", next_name="n.next", dtype="int64", shape=()),),
)
ONE = {"batch": 1}
KINDS = {
    "counting": (foreign.counting(), COUNTING),  # numbers without an axis, its state an integer
    "frames": (foreign.frames(), FRAMES),
    "letters": (foreign.letters(), LETTERS),
    "symbols": (foreign.symbols(), SYMBOLS),  # several inputs and outputs
    "deep": (foreign.deep(), DEEP),  # a state of rank 3, its batch axis 1
    "lstm": (foreign.lstm(), LSTM),  # a time axis, but no lengths
    "frames-1": (foreign.frames(1), FRAMES.model_copy(update=ONE)),  # graphs that fix the batch
    "symbols-2": (foreign.symbols(2), SYMBOLS.model_copy(update={"batch": 2})),
    "deep-1": (foreign.deep(1), DEEP.model_copy(update=ONE)),
    "lstm-1": (foreign.lstm(1), LSTM.model_copy(update=ONE)),
    "lstm-2": (foreign.lstm(2), LSTM.model_copy(update={"batch": 2})),
}


def write_repository(folder: Path) -> Path:
    """Writes one model of each kind, one that mixes its rows, one that overflows, one that cannot be stepped."""
    more = {
        "mixed": foreign.described(foreign.deep(mixed=True), DEEP, exact=False),
        "overflowing": foreign.described(foreign.symbols(overflowing=True), SYMBOLS),
        "both-ways": foreign.described(foreign.both_ways(), BOTH_WAYS),
    }
    for name, content in ({name: foreign.described(*kind) for name, kind in KINDS.items()} | more).items():
        repository_writer.write(folder, name, None, {MODEL_NAME: content})
    return folder


def by_hand(made: Any, told: Signature, x: Any, states: list[Any], length: int) -> tuple[list[list[Any]], list[Any]]:
    """Calls the graph as its users do today, one row and one time step at a time: outputs by step, last states."""
    session = ort.InferenceSession(made.SerializeToString())
    repeated = told.batch or 1
    outputs = []
    for t in range(length):
        feeds = {}
        for spec, tensor in zip(told.inputs, unpack(x), strict=True):
            step = tensor[:, t : t + 1] if told.time_axis else tensor[:, t]
            feeds[spec.name] = np.repeat(step, repeated, 0)
        feeds |= {
            spec.name: np.repeat(state, repeated, spec.batch_axis)
            for spec, state in zip(told.states, states, strict=True)
        }
        given = session.run([*(s.name for s in told.outputs), *(s.next_name for s in told.states)], feeds)
        count = len(told.outputs)
        outputs.append([tensor[0, 0] if told.time_axis else tensor[0] for tensor in given[:count]])
        states = [np.take(s, [0], spec.batch_axis) for s, spec in zip(given[count:], told.states, strict=True)]
    return outputs, states
