"""Small stateful ONNX models of all kinds, as other tools make them: none says anything about itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node as node

from cellserve.models.signature import METADATA_KEY, Exactness, ModelDocument, Signature, StateSpec, TensorSpec

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Info = tuple[str, int, list[Any]]


def weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * np.float32(0.5)


def model(nodes: list[Any], inputs: list[Info], outputs: list[Info], opset: int = 17, **constants: Any) -> Any:
    """A model of these nodes; an input or output is its name, its type and its shape."""
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info(*told) for told in inputs],
        [helper.make_tensor_value_info(*told) for told in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def described(made: Any, signature: Signature, exact: bool = True) -> bytes:
    """The model with a document about it, as the service wants it."""
    document = ModelDocument(name="foreign", signature=signature, exactness=Exactness(proved=exact, why=""))
    made = onnx.ModelProto.FromString(made.SerializeToString())
    helper.set_model_props(made, {METADATA_KEY: document.model_dump_json()})
    content: bytes = made.SerializeToString()
    return content


def frames(batch: Any = "batch") -> Any:
    """No time axis: `s.next = tanh(s W + x V)`, `y = s.next U`, over frames of 3 numbers, 4 units."""
    return model(
        [
            node("MatMul", ["s", "W"], ["sW"]),
            node("MatMul", ["x", "V"], ["xV"]),
            node("Add", ["sW", "xV"], ["z"]),
            node("Tanh", ["z"], ["s.next"]),
            node("MatMul", ["s.next", "U"], ["y"]),
        ],
        [("x", FLOAT, [batch, 3]), ("s", FLOAT, [batch, 4])],
        [("y", FLOAT, [batch, 2]), ("s.next", FLOAT, [batch, 4])],
        W=weights(1, 4, 4),
        V=weights(2, 3, 4),
        U=weights(3, 4, 2),
    )


def symbols(batch: Any = "batch", overflowing: bool = False) -> Any:
    """No time axis, two inputs (a symbol below 7, a level of 2 numbers), two outputs, one of them an integer."""
    given = [node("Mul", ["s.next", "lV"], ["a"]), node("Mul", ["lV", "a"], ["features"])]
    return model(
        [
            node("Gather", ["table", "symbol"], ["e"]),
            node("MatMul", ["level", "V"], ["lV"]),
            node("MatMul", ["s", "W"], ["sW"]),
            node("Sum", ["e", "lV", "sW"], ["z"]),
            node("Tanh", ["z"], ["s.next"]),
            *(given if overflowing else [node("Identity", ["s.next"], ["features"])]),
            node("ArgMax", ["s.next"], ["top"], axis=1, keepdims=0),
        ],
        [("symbol", INT64, [batch]), ("level", FLOAT, [batch, 2]), ("s", FLOAT, [batch, 4])],
        [("features", FLOAT, [batch, 4]), ("top", INT64, [batch]), ("s.next", FLOAT, [batch, 4])],
        table=weights(4, 7, 4),
        V=weights(5, 2, 4),
        W=weights(6, 4, 4),
    )


def elementwise(operator: str, width: int) -> tuple[Any, Signature]:
    """No time axis: `y = operator(x + s)` over numbers of one sign, `s.next = tanh(y)`; and its signature."""
    shape = ["batch", width]
    made = model(
        [
            node("Add", ["x", "s"], ["sum"]),
            node("Abs", ["sum"], ["size"]),
            node("Neg", ["size"], ["minus"]),
            node(operator, ["minus" if operator in ("Elu", "Selu") else "size"], ["y"]),
            node("Tanh", ["y"], ["s.next"]),
        ],
        [("x", FLOAT, shape), ("s", FLOAT, shape)],
        [("y", FLOAT, shape), ("s.next", FLOAT, shape)],
        opset=18,
    )
    spec = TensorSpec(name="x", shape=(width,))
    state = StateSpec(name="s", next_name="s.next", shape=(width,))
    outputs = (spec.model_copy(update={"name": "y"}),)
    return made, Signature(inputs=(spec,), outputs=outputs, states=(state,), lengths=None, time_axis=False)


def deep(batch: Any = "batch", mixed: bool = False) -> Any:
    """No time axis, one state `[2, batch, 4]` of rank 3 (two layers); mixed, each row sees the mean of all rows."""
    return model(
        [
            node("Split", ["state"], ["a", "b"], axis=0),
            node("Squeeze", ["a", "zero"], ["a2"]),
            node("Squeeze", ["b", "zero"], ["b2"]),
            node("MatMul", ["input", "V"], ["xV"]),
            node("MatMul", ["a2", "W"], ["aW"]),
            node("Add", ["xV", "aW"], ["za"]),
            node("Tanh", ["za"], ["a3"]),
            node("MatMul", ["b2", "W"], ["bW"]),
            node("Add", ["bW", "a3"], ["zb"]),
            node("Tanh", ["zb"], ["b3"]),
            node("Unsqueeze", ["a3", "zero"], ["a4"]),
            node("Unsqueeze", ["b3", "zero"], ["b4"]),
            node("Concat", ["a4", "b4"], ["stateN"], axis=0),
            *([node("ReduceMean", ["b3"], ["mean"], axes=[0], keepdims=1)] if mixed else []),
            node("Add", ["b3", "mean"], ["output"]) if mixed else node("Identity", ["b3"], ["output"]),
        ],
        [("input", FLOAT, [batch, 3]), ("state", FLOAT, [2, batch, 4])],
        [("output", FLOAT, [batch, 4]), ("stateN", FLOAT, [2, batch, 4])],
        zero=np.array([0], np.int64),
        V=weights(7, 3, 4),
        W=weights(8, 4, 4),
    )


def lstm(batch: Any = "batch", time: Any = "time", looks_ahead: bool = False) -> Any:
    """As PyTorch exports an LSTM with batch_first: x `[batch, time, 3]`, states `[1, batch, 4]`, no lengths.

    One that looks ahead adds the mean over all time steps to its output, so that its chunks are not the whole.
    """
    return model(
        [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            node("LSTM", ["xt", "W", "R", "", "", "h", "c"], ["yt", "hn", "cn"], hidden_size=4),
            node("Squeeze", ["yt", "one"], ["ys"]),
            node("Transpose", ["ys"], ["yb"], perm=[1, 0, 2]),
            *([node("ReduceMean", ["yb"], ["mean"], axes=[1], keepdims=1)] if looks_ahead else []),
            node("Add", ["yb", "mean"], ["out"]) if looks_ahead else node("Identity", ["yb"], ["out"]),
        ],
        [("x", FLOAT, [batch, time, 3]), ("h", FLOAT, [1, batch, 4]), ("c", FLOAT, [1, batch, 4])],
        [("out", FLOAT, [batch, time, 4]), ("hn", FLOAT, [1, batch, 4]), ("cn", FLOAT, [1, batch, 4])],
        one=np.array([1], np.int64),
        W=weights(9, 1, 16, 3),
        R=weights(10, 1, 16, 4),
    )


def both_ways(last_only: bool = False) -> Any:
    """A bidirectional LSTM over x `[batch, time, 3]`, which cannot be stepped; the mean of its outputs, or all."""
    return model(
        [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            node("LSTM", ["xt", "W", "R"], ["yt"], hidden_size=4, direction="bidirectional"),
            node("Transpose", ["yt"], ["yb"], perm=[2, 0, 1, 3]),
            node("Reshape", ["yb", "shape"], ["all"]),
            node("ReduceMean", ["all"], ["y"], axes=[1], keepdims=0) if last_only else node("Identity", ["all"], ["y"]),
        ],
        [("x", FLOAT, ["batch", "time", 3])],
        [("y", FLOAT, ["batch", 8] if last_only else ["batch", "time", 8])],
        shape=np.array([0, 0, 8], np.int64),
        W=weights(11, 2, 16, 3),
        R=weights(12, 2, 16, 4),
    )


def letters() -> Any:
    """No time axis, one integer below 7 a time step; the output has 7 entries."""
    return model(
        [
            node("Gather", ["table", "ids"], ["e"]),
            node("MatMul", ["s", "W"], ["sW"]),
            node("Add", ["e", "sW"], ["z"]),
            node("Tanh", ["z"], ["s.next"]),
            node("MatMul", ["s.next", "U"], ["y"]),
        ],
        [("ids", TensorProto.INT32, ["batch"]), ("s", FLOAT, ["batch", 4])],
        [("y", FLOAT, ["batch", 7]), ("s.next", FLOAT, ["batch", 4])],
        table=weights(13, 7, 4),
        W=weights(14, 4, 4),
        U=weights(15, 4, 7),
    )


def counting() -> Any:
    """No time axis; `y = x + n` and `n.next = n + 1`, all of them one number a row, n an integer."""
    return model(
        [
            node("Cast", ["n"], ["number"], to=FLOAT),
            node("Add", ["x", "number"], ["y"]),
            node("Add", ["n", "one"], ["n.next"]),
        ],
        [("x", FLOAT, ["batch"]), ("n", INT64, ["batch"])],
        [("y", FLOAT, ["batch"]), ("n.next", INT64, ["batch"])],
        one=np.int64(1),
    )
