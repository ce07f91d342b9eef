"""Every conversion to ONNX gives Keras's numbers for special values too: zeros, ties, infinities, NaN, extremes.

Each function is tried alone and under the guard `where(isfinite(f), f, 0)`. Functions of one kind of input are traced
and converted together: one by one they would take minutes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest

import tests.networks  # noqa: F401  imports TensorFlow quietly

import keras  # isort: skip
import tensorflow as tf  # isort: skip
from keras import activations, layers, ops  # isort: skip

from cellserve.export.errors import ExportError
from cellserve.export.onnx_graph.tf_trace import convert, trace

INF, NAN = math.inf, math.nan
POSITIVE = [0.0, 1, 0.5, 1.5, 2.5, 2, 3, 7.3, 20, 60, 88.8, 100, 127.5, 1e-30, 1e-7, 1e-3, 0.1, 0.9999999, math.pi]
POSITIVE += [2**24 + 1, 2.0**31, 3e9, 1e19, 1e30, 3e38, INF]
SPECIAL = np.array([*POSITIVE, *(-value for value in POSITIVE), NAN], np.float32)
PAIRED = SPECIAL[~np.isin(np.abs(SPECIAL), np.array([1e-30, 3e38], np.float32))]  # no subnormal quotients
WHOLE = np.array([0, 1, 2, 3, 5, 7, 24, 31, 100, 2**15, 2**24, 2**24 + 1, 2**31 - 1], np.int32)
WHOLE = np.concatenate([WHOLE, -WHOLE[1:], np.array([-(2**31)], np.int32)])
ROWS = np.array(
    [
        *([value] * 5 for value in (0, -0.0, 1, 1e-30, 1e20, -100, INF, -INF, NAN)),  # ties
        *([NAN, 1, 2, 3, 4], [1, 2, NAN, 3, 4], [4, 3, 2, 1, NAN], [2, NAN, 2, NAN, INF]),
        *([INF, 1, 2, 3, 4], [-INF, 1, 2, 3, 4], [INF, -INF, 0, 0, 0], [-1, -2, NAN, -INF, INF]),
        *([3e38, 3e38, 0, 0, 0], [1e-25, 0, 0, 0, 0], [1e30, 1, -5, 2, 3], [88.8, 88.8, 88.8, -100, 0]),
        *([100, 100, 1, 2, 3], [1000, 999, 998, 0, -1000], [-1000, -1001, -1002, -1003, -1004]),
        *([3, 1, 3, 2, 3], [1, 3, 2, 3, 1], [-3, -1, -3, -2, -3], [0.5, -0.5, 1.5, 2.5, -2.5], [0, 1, 0, 1, 0]),
    ],
    np.float32,
)
DIVISORS = np.where(WHOLE == 0, 9, WHOLE)
TOGETHER = 20  # functions converted at once: the time of a conversion grows faster than its graph
STEPS = np.array([-2, 0, 1, 1, 3], np.float32)
GRIDS: dict[str, list[Any]] = {
    "number": [np.tile(SPECIAL, (3, 1))],  # rows of an odd length: kernels treat the last entries apart
    "numbers": [np.repeat(PAIRED[:, None], len(PAIRED), 1), np.repeat(PAIRED[None], len(PAIRED), 0)],
    "row": [ROWS],
    "rows": [ROWS, np.roll(ROWS, 7, 0)],
    "integer": [np.tile(WHOLE, (3, 1))],
    "integers": [np.repeat(WHOLE[:, None], len(WHOLE), 1), np.repeat(DIVISORS[None], len(WHOLE), 0)],
    "truths": [np.array([[1], [1], [0], [0]], bool), np.array([[1], [0], [1], [0]], bool)],
}


class Case(NamedTuple):
    """A function, and how far its result may be from Keras's."""

    function: Callable[..., Any]
    absolute: float = 0.0  # beside 1e-6 of the value
    signed: bool = False  # whether zeros have Keras's signs


def named(names: str, module: Any = ops, **how: Any) -> dict[str, Case]:
    return {name: Case(getattr(module, name), **how) for name in names.split()}


def along(names: str) -> dict[str, Case]:
    return {name: Case(functools.partial(getattr(ops, name), axis=-1)) for name in names.split()}


def cast(x: Any, *types: str) -> Any:
    return functools.reduce(ops.cast, types, x)


def built(layer: Any) -> Any:
    layer.build((None, 5))
    return layer


ROUNDED = 3e-7  # functions near 1 or of large terms that cancel: digits of the result are lost in Keras too
CASES: dict[str, dict[str, Case]] = {
    "number": {
        **named(
            "abs arcsin arccos arcsinh arctan arctanh ceil cos exp exp2 expm1 fabs floor log log10 log1p", signed=True
        ),
        **named("log2 negative reciprocal round rsqrt sign sin sinh sqrt square tan tanh", signed=True),
        **named("arccosh angle cbrt cosh deg2rad rad2deg sinc trunc real conj signbit isfinite isinf isnan isneginf"),
        **named("isposinf logical_not nan_to_num relu relu6 elu celu selu leaky_relu hard_sigmoid hard_silu hard_tanh"),
        **named("hard_shrink soft_shrink softplus softsign sparse_plus sparse_sigmoid squareplus log_sigmoid"),
        **named("erf erfc sigmoid silu gelu tanh_shrink", absolute=ROUNDED),
        **named("mish exponential", activations, absolute=1e-36),
        "gelu exactly": Case(lambda x: ops.gelu(x, approximate=False), absolute=ROUNDED),
        "relu with everything": Case(lambda x: activations.relu(x, 0.1, 6.0, 0.5)),
        "relu with a threshold": Case(lambda x: activations.relu(x, threshold=0.5)),
        "threshold": Case(lambda x: ops.threshold(x, 0.5, -1.0)),
        "x (x > c)": Case(lambda x: x * cast(x > 0.5, "float32"), signed=True),
        "maximum(c x, x)": Case(lambda x: ops.maximum(0.1 * x, x)),
        "maximum(0 x, x)": Case(lambda x: ops.maximum(0.0 * x, x)),
        "clip": Case(lambda x: ops.clip(x, -1.0, 1.0)),
        "round to a digit": Case(lambda x: ops.round(x, 1)),
        **{f"x ** {power}": Case(lambda x, power=power: ops.power(x, power)) for power in (-3, -0.5, 0, 1, 2, 2.5)},
        "0 ** x": Case(lambda x: ops.power(0.0, x)),
        "mod 3": Case(lambda x: x % 3.0, signed=True),
        "mod -3": Case(lambda x: x % -3.0, signed=True),
        "mod 2 pi": Case(lambda x: ops.mod(x, 2 * np.pi), signed=True),
        "// 0.3": Case(lambda x: x // 0.3, signed=True),
        "digitize": Case(lambda x: ops.digitize(x, np.array([-1.0, 0.0, 1.0, 2.5], np.float32))),
        "float16 and back": Case(lambda x: cast(x, "float16", "float32")),
        **{f"to {to}": Case(lambda x, to=to: cast(x, to)) for to in ("bool", "int32", "int64", "float64")},
        "where by value": Case(lambda x: ops.where(x > 0, 1 / x, x)),
        # Where a small result is divided by, compared or put into a logarithm, its digits are Keras's.
        "log(sigmoid)": Case(lambda x: ops.log(ops.sigmoid(x)), absolute=ROUNDED),
        "log(sigmoid + 1e-7)": Case(lambda x: ops.log(ops.sigmoid(x) + 1e-7), absolute=ROUNDED),
        "1 / sigmoid": Case(lambda x: 1 / ops.sigmoid(x)),
        "1 / silu": Case(lambda x: 1 / ops.silu(x)),
        "sigmoid > 0": Case(lambda x: ops.sigmoid(x) > 0),
        "log(erfc)": Case(lambda x: ops.log(ops.erfc(x)), absolute=3e-6),
        "1 / tanh": Case(lambda x: 1 / ops.tanh(x)),
        "1 / elu": Case(lambda x: 1 / ops.elu(x)),
        "1 / selu": Case(lambda x: 1 / ops.selu(x)),
        "arctan2(x, elu)": Case(lambda x: ops.arctan2(x, ops.elu(x)), signed=True),
        "arctan2(1e-8, sigmoid)": Case(lambda x: ops.arctan2(1e-8, ops.sigmoid(x))),
        "1 / softplus": Case(lambda x: 1 / ops.softplus(x)),
    },
    "numbers": {
        **named("arctan2 floor_divide mod fmod", signed=True),
        **named("add divide divide_no_nan equal fmax fmin greater greater_equal heaviside isclose less less_equal"),
        **named("hypot logaddexp logical_and logical_or logical_xor maximum minimum multiply not_equal power subtract"),
        "where": Case(lambda x, y: ops.where(x > y, 1 / x, y)),
        "clip to y": Case(lambda x, y: ops.clip(x, -1.0, y)),
    },
    "row": {
        **along(
            "all amax amin any argmax argmin average count_nonzero cumprod cumsum diff flip log_softmax logsumexp max"
        ),
        **along("mean median min nanargmax nanargmin nancumprod nancumsum nanmax nanmean nanmin nanprod nanstd nansum"),
        **along("nanvar norm normalize prod ptp rms_normalization softmax std sum trapezoid var"),
        "max over two axes": Case(lambda x: ops.max(x[:, :, None] * x[:, None], axis=(1, 2))),
        "x / max": Case(lambda x: x / ops.max(ops.abs(x), -1, keepdims=True)),
        "normalized gates": Case(lambda x: (g := ops.sigmoid(x)) / ops.sum(g, -1, keepdims=True), absolute=ROUNDED),
        "1 / softmax": Case(lambda x: 1 / ops.softmax(x)),
        "reverse cumprod": Case(lambda x: tf.math.cumprod(x, 1, exclusive=True, reverse=True)),
        "norm of order infinity": Case(lambda x: ops.norm(x, ord=np.inf, axis=-1)),
        "one_hot of a computed depth": Case(lambda x: tf.one_hot(cast(x[:, 0], "int32"), tf.shape(x)[1])),
        "roll": Case(lambda x: ops.roll(x, 2, axis=-1)),
        "take": Case(lambda x: ops.take(x, [1, -1, 0], axis=-1)),
        "tril": Case(lambda x: ops.tril(x[:, :, None] * x[:, None])),
        "causal mask": Case(lambda x: tf.linalg.band_part(tf.ones(tf.stack([tf.shape(x)[0]] * 2), "int32"), -1, 0)),
        "band": Case(lambda x: tf.linalg.band_part(x[:, :, None] * x[:, None], 1, 2)),
        "triu": Case(lambda x: ops.triu(x[:, :, None] * x[:, None], 1)),
        "slice_update": Case(lambda x: ops.slice_update(x, (0, 1), x[:, :2] * 2)),
        "searchsorted": Case(lambda x: ops.searchsorted(STEPS, ops.reshape(x, (-1,)))),
        "searchsorted, right": Case(lambda x: ops.searchsorted(STEPS, ops.reshape(x, (-1,)), side="right")),
        "max_pool": Case(lambda x: ops.max_pool(x[:, :, None], 2, 1)),
        "max_pool, same": Case(lambda x: ops.max_pool(x[:, :, None], 2, 1, padding="same")),
        "average_pool": Case(lambda x: ops.average_pool(x[:, :, None], 2, 1)),
        "GlobalMaxPooling1D": Case(lambda x: layers.GlobalMaxPooling1D()(x[:, :, None])),
        "LayerNormalization": Case(built(layers.LayerNormalization()), absolute=ROUNDED),
        "BatchNormalization": Case(built(layers.BatchNormalization())),
        "PReLU": Case(built(layers.PReLU())),
        "Discretization": Case(layers.Discretization([0.0, 1.0, 2.5])),
        "UnitNormalization": Case(layers.UnitNormalization()),
    },
    "rows": {
        "einsum": Case(lambda x, y: ops.einsum("bi,bj->bij", x, y)),
        "select": Case(lambda x, y: ops.select([x > y, x < y], [1 / x, 1 / y], 0.0)),
        "linspace": Case(lambda x, y: ops.linspace(x, y, 4, axis=-1), absolute=1e-6),
        "logaddexp": Case(ops.logaddexp),
    },
    "integer": {
        **named("abs ceil conj floor logical_not negative round sign square bitwise_invert"),
        **named("cos log log1p expm1 sqrt sin", absolute=ROUNDED),
        **along("argmax argmin max min mean sort any all"),
        **{f"mod {by}": Case(lambda x, by=by: x % by) for by in (3, -3)},
        **{f"// {by}": Case(lambda x, by=by: x // by) for by in (3, -3)},
        "clip": Case(lambda x: ops.clip(x, -3, 5)),
        "one_hot": Case(lambda x: ops.one_hot(x, 4)),
        "one_hot along axis 1": Case(lambda x: ops.one_hot(x, 4, axis=1)),
        "one_hot of truths": Case(lambda x: ops.one_hot(x, 4, dtype="bool")),
        "multi_hot": Case(lambda x: ops.multi_hot(x, 6)),
        "top_k": Case(lambda x: ops.top_k(x, 3)[0]),
        "places of top_k": Case(lambda x: ops.top_k(x, 3)[1]),
        "digitize": Case(lambda x: ops.digitize(x, [-3, 0, 5])),
        "bool and back": Case(lambda x: cast(x, "bool", "float32")),
        "int8 and back": Case(lambda x: cast(x, "int8", "int32")),
        "max of int16": Case(lambda x: ops.max(cast(x, "int16"), -1)),
    },
    "integers": {
        **named(
            "add bitwise_and bitwise_or bitwise_xor divide equal floor_divide greater greater_equal less less_equal"
        ),
        **named("logical_and logical_or logical_xor maximum minimum mod multiply not_equal subtract"),
        **{
            f"{name} of {of}": Case(lambda x, y, of=of, name=name: getattr(ops, name)(cast(x, of), cast(y, of)))
            for of in ("int64", "uint8")
            for name in ("greater", "less_equal")
        },
        "// of int64": Case(lambda x, y: cast(x, "int64") * 2**32 // cast(y, "int64")),
        "mod of int64": Case(lambda x, y: cast(x, "int64") * 2**32 % cast(y, "int64")),
        "shift left": Case(lambda x, y: ops.left_shift(x, ops.clip(y, 0, 31))),
        "shift right": Case(lambda x, y: ops.right_shift(x, ops.clip(y, 0, 31))),
        "where": Case(lambda x, y: ops.where(x > y, x, y)),
    },
    "truths": {
        **named("equal logical_and logical_or logical_xor not_equal"),
        "where": Case(lambda x, y: ops.where(x, y, ops.logical_not(y))),
        **{f"{name} of x": Case(lambda x, y, name=name: getattr(ops, name)(x, axis=-1)) for name in ("argmax", "sum")},
    },
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "Bitcast": lambda x: ops.view(x, "int32"),
    "bfloat16": lambda x: cast(x, "bfloat16", "float32"),
    "Erfinv": ops.erfinv,
}


def guarded(y: Any) -> Any:
    return ops.where(ops.isfinite(y), y, ops.zeros_like(y))


BATCHES = [
    (kind, names[first : first + TOGETHER])
    for kind, names in ((kind, list(cases)) for kind, cases in CASES.items())
    for first in range(0, len(names), TOGETHER)
]


def converted(kind: str, names: list[str]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Keras's result and the one in ONNX for each function, alone and guarded; all converted together."""
    feeds = GRIDS[kind]
    functions: dict[tuple[str, str], Callable[..., Any]] = {}
    for name in names:
        function = functions[name, "alone"] = CASES[kind][name].function
        if function(*map(tf.constant, feeds)).dtype == "float32":
            functions[name, "guarded"] = lambda *x, function=function: guarded(function(*x))
    true = [np.asarray(function(*map(tf.constant, feeds))) for function in functions.values()]
    specs = [tf.TensorSpec([None, *feed.shape[1:]], feed.dtype) for feed in feeds]
    together = trace(lambda *x: [tf.identity(function(*x)) for function in functions.values()], specs)
    model = convert(together, keras.Sequential())
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    made = session.run(None, dict(zip(inputs, feeds, strict=True)))
    return dict(zip(functions, zip(true, made, strict=True), strict=True))


@pytest.mark.parametrize(("kind", "names"), BATCHES, ids=[f"{kind}: {', '.join(names)}" for kind, names in BATCHES])
def test_conversions_give_keras_numbers_for_special_values(kind: str, names: list[str]) -> None:
    wrong = []
    for (name, how), (true, made) in converted(kind, names).items():
        case = CASES[kind][name]
        try:
            assert (made.dtype, made.shape) == (true.dtype, true.shape)
            # Not only which are finite: `nan_to_num` and comparisons tell NaN and the infinities apart.
            np.testing.assert_allclose(made, true, rtol=1e-6, atol=case.absolute + 1e-37)
            if case.signed and how == "alone":
                numbers = ~np.isnan(true)  # the sign of NaN means nothing
                np.testing.assert_array_equal(np.signbit(made[numbers]), np.signbit(true[numbers]))
        except AssertionError as error:
            wrong.append(f"{name}, {how}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_conversion_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(ExportError, match=name):
        convert(trace(REFUSED[name], [tf.TensorSpec([None, 3], "float32")]), keras.Sequential())
