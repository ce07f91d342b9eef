"""Random recurrent networks: their plan as plain data (drawn, shrunk, saved), and the Keras model that it describes.

Cells are expressions over their input and states, written with `keras.ops`: gates, norms, guards, selects, roundings.
Around them stand Keras's own layers, in stacks and residuals, behind masks, embeddings and time-distributed layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import keras
from hypothesis import strategies as st
from keras import layers, ops

UNITS = 4
VOCABULARY = 7


def _attend(x: Any) -> Any:
    """Attention of a state's entries to each other."""
    weights = ops.softmax(ops.matmul(x, ops.transpose(x, (0, 2, 1))))
    return ops.reshape(ops.matmul(weights, x), (-1, UNITS))


UNARY: dict[str, Callable[[Any], Any]] = {
    "tanh": ops.tanh,
    "sigmoid": ops.sigmoid,
    "relu": ops.relu,
    "elu": ops.elu,
    "selu": ops.selu,
    "silu": ops.silu,
    "gelu": ops.gelu,
    "softplus": ops.softplus,
    "softsign": ops.softsign,
    "hard_sigmoid": ops.hard_sigmoid,
    "leaky_relu": ops.leaky_relu,
    "softmax": lambda x: ops.softmax(x, axis=-1),
    "log_softmax": lambda x: ops.log_softmax(x, axis=-1),
    "absolute": ops.absolute,
    "square": ops.square,
    "sign": ops.sign,
    "negative": ops.negative,
    "floor": ops.floor,
    "round": ops.round,
    "sin": ops.sin,
    "cos": ops.cos,
    "clip": lambda x: ops.clip(x, -1.0, 1.0),
    "exp": lambda x: ops.exp(-ops.absolute(x)),
    "log_energy": lambda x: ops.log(ops.square(x) + 1e-6),
    "log1p": lambda x: ops.log1p(ops.absolute(x)),
    "sqrt": lambda x: ops.sqrt(ops.absolute(x)),
    "norm": lambda x: (x - ops.mean(x, -1, keepdims=True)) / ops.sqrt(ops.var(x, -1, keepdims=True) + 1e-3),
    "guarded_reciprocal": lambda x: ops.where(ops.isfinite(1 / x), 1 / x, ops.zeros_like(x)),
    "guarded_log": lambda x: ops.where(x > 0.5, ops.log(x), ops.zeros_like(x)),
    "nan_to_num": lambda x: ops.nan_to_num(1 / x, nan=0.0, posinf=1.0, neginf=-1.0),
    "shares": lambda x: x / (ops.sum(ops.absolute(x), axis=-1, keepdims=True) + 1e-3),
    "largest": lambda x: ops.one_hot(ops.argmax(x, axis=-1), UNITS, dtype=x.dtype),
    "flipped": lambda x: ops.flip(x, axis=-1),
    "sorted": lambda x: ops.sort(x, axis=-1),
    "sums": lambda x: ops.cumsum(x, axis=-1),
    "expm1": lambda x: ops.expm1(-ops.absolute(x)),
    "erf": ops.erf,
    "rsqrt": lambda x: ops.rsqrt(1.0 + ops.square(x)),
    "log_sigmoid": ops.log_sigmoid,
    "whole": lambda x: ops.cast(ops.cast(ops.clip(x, -100.0, 100.0), "int32"), "float32"),
    "fractions": lambda x: x - ops.floor(x),
    "spread": lambda x: ops.std(x, axis=-1, keepdims=True) + ops.zeros_like(x),
    "two_largest": lambda x: ops.concatenate([ops.top_k(x, 2)[0], ops.top_k(-x, UNITS - 2)[0]], axis=-1),
    "attend": lambda x: _attend(ops.reshape(x, (-1, UNITS // 2, 2))),
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": ops.add,
    "subtract": ops.subtract,
    "multiply": ops.multiply,
    "maximum": ops.maximum,
    "minimum": ops.minimum,
    "ratio": lambda a, b: a / (1.0 + ops.square(b)),
    "gate": lambda a, b: ops.sigmoid(a) * b,
    "select": lambda a, b: ops.where(a > 0.25, a, b),
    "select_equal": lambda a, b: ops.where(ops.equal(a, 0), b, a),
    "arctan2": ops.arctan2,
    "floor_divide": lambda a, b: ops.floor_divide(a, 1.0 + ops.absolute(b)),
    "power": lambda a, b: ops.power(0.5 + ops.absolute(ops.clip(a, -2.0, 2.0)), ops.clip(b, -2.0, 2.0)),
    "logaddexp": ops.logaddexp,
    "hypot": ops.hypot,
    "greater": lambda a, b: ops.cast(a > b, "float32") * a,
    "mod": lambda a, b: ops.mod(a, 1.0 + ops.absolute(b)),
}
OPERATIONS: dict[str, Callable[..., Any]] = {**UNARY, **BINARY}
# Layers within a cell; a cell has at most one of each.
SUBLAYERS: dict[str, Callable[[], Any]] = {
    "layer_norm": lambda: layers.LayerNormalization(name="layer_norm"),
    "dense": lambda: layers.Dense(UNITS, activation="tanh", name="dense"),
}
BOUNDS = ("tanh", "clip", "sigmoid", "softsign")


@keras.saving.register_keras_serializable(package="fuzz")
class ExpressionCell(layers.Layer):
    """A cell whose next states and output are expressions: `[name, *operands]`, or the name of a leaf.

    Leaves are "x" and "s0", "s1", ... (the state itself), each multiplied with a kernel where "@" follows.
    """

    def __init__(self, next_states: Any, output: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.next_states, self.output_expression = next_states, output
        self.state_size = [UNITS] * len(next_states)
        self.output_size = UNITS
        used = {name for name in SUBLAYERS if f'"{name}"' in json.dumps([next_states, output])}
        self.sublayers = {name: SUBLAYERS[name]() for name in sorted(used)}

    def build(self, input_shape: Any) -> None:
        self.kernels = {}
        for number in range(3):
            self.kernels[f"x@{number}"] = self.add_weight((input_shape[-1], UNITS), name=f"x{number}")
            for state in range(len(self.next_states)):
                name = f"s{state}@{number}"
                self.kernels[name] = self.add_weight((UNITS, UNITS), name=f"s{state}_{number}")
        self.bias = self.add_weight((UNITS,), initializer="random_normal", name="bias")
        for layer in self.sublayers.values():
            layer.build((None, UNITS))
        self.built = True

    def call(self, inputs: Any, states: Any) -> Any:
        def value(expression: Any) -> Any:
            if isinstance(expression, str):
                if expression == "bias":
                    return self.bias + ops.zeros_like(states[0])
                tensor = inputs if expression[0] == "x" else states[int(expression[1])]
                return ops.matmul(tensor, self.kernels[expression]) if "@" in expression else tensor
            name, *operands = expression
            operation = self.sublayers[name] if name in SUBLAYERS else OPERATIONS[name]
            return operation(*map(value, operands))

        following = [value(expression) for expression in self.next_states]
        return value(self.output_expression), following

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "next_states": self.next_states, "output": self.output_expression}


@keras.saving.register_keras_serializable(package="fuzz")
class AroundCell(layers.Layer):
    """A cell around one of Keras's, whose output or states it changes."""

    def __init__(self, cell: str, change: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cell_name, self.change = cell, change
        self.cell = getattr(layers, cell)(UNITS, name="cell")
        self.state_size, self.output_size = self.cell.state_size, UNITS

    def build(self, input_shape: Any) -> None:
        self.cell.build(input_shape)
        self.built = True

    def call(self, inputs: Any, states: Any) -> Any:
        output, following = self.cell(inputs, states)
        if self.change == "residual":
            return output + ops.mean(inputs, axis=-1, keepdims=True), following
        following = following if isinstance(following, (list, tuple)) else [following]
        before = states if isinstance(states, (list, tuple)) else [states]
        changes = {
            "decay": lambda new, old: 0.75 * new + 0.25 * old,
            "clip": lambda new, old: ops.clip(new, -0.5, 0.5),
            "hold": lambda new, old: ops.where(ops.absolute(new) > 0.1, new, old),
        }
        return output, [changes[self.change](new, old) for new, old in zip(following, before, strict=True)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "cell": self.cell_name, "change": self.change}


def expressions(states: int) -> st.SearchStrategy[Any]:
    """Expressions over an input and so many states."""
    kernels = [f"{name}@{number}" for name in ("x", *(f"s{state}" for state in range(states))) for number in range(3)]
    leaves = st.sampled_from([*kernels, *(f"s{state}" for state in range(states)), "bias"])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(st.sampled_from(sorted({**UNARY, **SUBLAYERS})), inner).map(list),
            st.tuples(st.sampled_from(sorted(BINARY)), inner, inner).map(list),
        ),
        max_leaves=5,
    )


@st.composite
def cells(draw: Any) -> dict[str, Any]:
    """Plans of cells; their states stay bounded, so that Keras's numbers stay finite for many steps."""
    count = draw(st.integers(1, 3))
    inner = expressions(count)
    states = [[draw(st.sampled_from(BOUNDS)), draw(inner)] for _ in range(count)]
    return {"next_states": states, "output": draw(st.one_of(st.just("s0"), inner))}


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
RECURRENT = ("LSTM", "GRU", "SimpleRNN")
CELLS = ("LSTMCell", "GRUCell", "SimpleRNNCell")
CHANGES = ("residual", "decay", "clip", "hold")
POINTWISE = ("dense", "layer_norm", "batch_norm", "time_distributed", "dropout", "rescaling", "select", "log_energy")


@st.composite
def networks(draw: Any) -> dict[str, Any]:
    """Plans of networks, all of them causal unless one of its layers reads backwards, and numbers to try them with."""
    recurrences = st.one_of(
        st.fixed_dictionaries({"kind": st.sampled_from(RECURRENT)}),
        st.fixed_dictionaries(
            {"kind": st.just("around"), "cell": st.sampled_from(CELLS), "change": st.sampled_from(CHANGES)}
        ),
        st.fixed_dictionaries({"kind": st.just("cells"), "cells": st.lists(cells(), min_size=1, max_size=2)}),
    )
    body = draw(st.lists(st.one_of(st.sampled_from(POINTWISE), recurrences), max_size=3))
    body.insert(draw(st.integers(0, len(body))), draw(recurrences))
    return {
        "input": draw(st.sampled_from(["float", "float", "masked", "integer", "masked integer", "two"])),
        "body": body,
        "residual": draw(st.booleans()),
        "backwards": draw(st.sampled_from([None] * 9 + [draw(st.integers(0, len(body)))])),  # before which layer
        "last": draw(st.booleans()),
        "numbers": draw(st.lists(NUMBERS, max_size=4)),
    }


def is_causal(plan: dict[str, Any]) -> bool:
    return plan["backwards"] is None


def build(plan: dict[str, Any]) -> Any:
    """Builds the Keras model of a plan, with weights that depend on nothing else."""
    keras.utils.set_random_seed(7)
    inputs, x = _inputs(plan["input"])
    x = layers.Dense(UNITS)(x)
    last = max(place for place, layer in enumerate(plan["body"]) if isinstance(layer, dict))
    for place, layer in enumerate(plan["body"]):
        if place == plan["backwards"] and len(x.shape) == 3:
            x = layers.Bidirectional(layers.LSTM(UNITS // 2, return_sequences=True))(x)
        sequences = place != last or not plan["last"]
        y = _pointwise(layer, x) if isinstance(layer, str) else _recurrent(layer, x, sequences)
        x = layers.Add()([x, y]) if plan["residual"] and sequences and len(y.shape) == len(x.shape) else y
    if plan["backwards"] == len(plan["body"]):
        x = layers.Bidirectional(layers.LSTM(2))(x) if len(x.shape) == 3 else x
    return keras.Model(inputs, layers.Dense(2)(x))


def _inputs(kind: str) -> tuple[Any, Any]:
    if kind in ("integer", "masked integer"):
        ids = keras.Input((None,), dtype="int32", name="ids")
        return ids, layers.Embedding(VOCABULARY, 3, mask_zero=kind == "masked integer")(ids)
    x = keras.Input((None, 3), name="x")
    if kind == "masked":
        return x, layers.Masking(0.0)(x)
    if kind == "two":
        other = keras.Input((None, 2), name="other")
        return [x, other], layers.Concatenate()([x, other])
    return x, x


def _pointwise(name: str, x: Any) -> Any:
    if name == "select":
        return ops.where(x > 0.5, x, ops.zeros_like(x))
    if name == "time_distributed" and len(x.shape) == 2:  # behind a layer that gives its last output
        name = "dense"
    if name == "log_energy":
        return ops.log(ops.square(x) + 1e-6)
    return {
        "dense": lambda: layers.Dense(UNITS, activation="relu"),
        "layer_norm": layers.LayerNormalization,
        "batch_norm": layers.BatchNormalization,
        "time_distributed": lambda: layers.TimeDistributed(layers.Dense(UNITS, activation="gelu")),
        "dropout": lambda: layers.Dropout(0.5),
        "rescaling": lambda: layers.Rescaling(3.0, offset=0.5),
    }[name]()(x)


def _recurrent(plan: dict[str, Any], x: Any, sequences: bool) -> Any:
    if plan["kind"] == "around":
        return layers.RNN(AroundCell(plan["cell"], plan["change"]), return_sequences=sequences)(x)
    if plan["kind"] != "cells":
        return getattr(layers, plan["kind"])(UNITS, return_sequences=sequences)(x)
    made = [ExpressionCell(each["next_states"], each["output"]) for each in plan["cells"]]
    return layers.RNN(made if len(made) > 1 else made[0], return_sequences=sequences)(x)
