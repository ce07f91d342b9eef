"""`cellserve adopt`: every layout that PyTorch's users export is served, and gives what a plain loop gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.helper import make_node as node

from cellserve.export.errors import ExportError
from tests import foreign
from tests.export.adopting import Adopt, assert_served_as_in_a_plain_loop, drawn
from tests.foreign import FLOAT, INT64

BOOL, HALF, DOUBLE = TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.DOUBLE
UNITS = 8


def streaming(
    operator: str = "GRU", x: list[Any] | None = None, batch: Any = "batch", names: tuple[str, ...] = ()
) -> Any:
    """Two layers, as PyTorch exports them for streaming: `x [1, batch, 9]`, and states `[2, batch, 8]`."""
    x = [1, batch, 9] if x is None else x
    batch_first = x[1] == 1 and x[0] != 1
    gates = {"GRU": 3, "LSTM": 4}[operator]
    carried = ["h0", "c0"] if operator == "LSTM" else ["h0"]
    nodes = [node("Transpose", ["x"], ["l0"], perm=[1, 0, 2]) if batch_first else node("Identity", ["x"], ["l0"])]
    nodes += [node("Split", [name], [f"{name}.0", f"{name}.1"], axis=0) for name in carried]
    constants: dict[str, Any] = {"one": np.array([1], np.int64)}
    for layer in range(2):
        constants[f"W{layer}"] = foreign.weights(20 + layer, 1, gates * UNITS, 9 if layer == 0 else UNITS)
        constants[f"R{layer}"] = foreign.weights(30 + layer, 1, gates * UNITS, UNITS)
        initial = [f"{name}.{layer}" for name in carried]
        outputs = [f"y{layer}", *(f"{name}.{layer}.n" for name in carried)]
        given = [f"l{layer}", f"W{layer}", f"R{layer}", "", "", *initial]
        nodes += [
            node(operator, given, outputs, hidden_size=UNITS),
            node("Squeeze", [f"y{layer}", "one"], [f"l{layer + 1}"]),
        ]
    nodes += [node("Concat", [f"{name}.0.n", f"{name}.1.n"], [f"{name[0]}n"], axis=0) for name in carried]
    nodes.append(
        node("Transpose", ["l2"], ["output"], perm=[1, 0, 2]) if batch_first else node("Identity", ["l2"], ["output"])
    )
    states = [(name, FLOAT, [2, batch, UNITS]) for name in carried]
    following = [(f"{name[0]}n", FLOAT, [2, batch, UNITS]) for name in carried]
    made = foreign.model(
        nodes, [("x", FLOAT, x), *states], [("output", FLOAT, [*x[:2], UNITS]), *following], **constants
    )
    for old, new in zip(("x", "h0", "output", "hn"), names, strict=False):
        renamed(made, old, new)
    return made


def renamed(made: Any, old: str, new: str) -> None:
    for port in (*made.graph.input, *made.graph.output):
        port.name = new if port.name == old else port.name
    for one in made.graph.node:
        for tensors in (one.input, one.output):
            tensors[:] = [new if name == old else name for name in tensors]


STREAMING: dict[str, tuple[str, list[Any] | None, Any, int | None]] = {
    "a GRU, the batch found by its shared name": ("GRU", None, "batch", None),
    "an LSTM": ("LSTM", None, "batch", None),
    "batch first": ("LSTM", ["batch", 1, 9], "batch", None),
    "one row": ("GRU", None, 1, 1),
    "one row, batch first": ("LSTM", [1, 1, 9], 1, 1),
    "dimensions without names": ("GRU", [1, None, 9], None, None),
}


@pytest.mark.parametrize("case", STREAMING)
def test_a_recurrence_of_one_time_step_loses_its_time_axis_and_takes_many_rows(adopt: Adopt, case: str) -> None:
    operator, x, batch, rows = STREAMING[case]
    made = streaming(operator, x, batch)
    model = adopt(made)
    signature = model.document.signature
    assert (signature.time_axis, signature.batch) == (False, rows)
    assert (signature.inputs[0].shape, signature.outputs[0].shape) == ((9,), (UNITS,))
    assert {state.shape for state in signature.states} == {(2, UNITS)}
    zeros = np.zeros((2, 1, UNITS), np.float32)
    states = {state.name: (state.next_name, zeros) for state in signature.states}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None, None]}, states)


def test_a_time_axis_before_one_fixed_row_is_found(adopt: Adopt) -> None:
    made = streaming(x=["time", 1, 9], batch=1)
    made.graph.node[0].CopyFrom(node("Identity", ["x"], ["l0"]))
    made.graph.node[-1].CopyFrom(node("Identity", ["l2"], ["output"]))
    model = adopt(made)
    assert (model.document.signature.time_axis, model.document.signature.batch) == (True, 1)
    states = {"h0": ("hn", np.zeros((2, 1, UNITS), np.float32))}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None, None]}, states)


def test_a_graph_without_names_is_reported_with_its_outputs_and_the_flag_to_give(adopt: Adopt) -> None:
    made = streaming(names=("0", "1", "85", "86"))
    with pytest.raises(ExportError) as refused:
        adopt(made)
    told = str(refused.value)
    assert "give --state INPUT=OUTPUT, such as --state 1=86 " in told
    assert "outputs: 85 [1, batch, 8], 86 [2, batch, 8]" in told
    assert adopt(made, "--state", "1=86").document.signature.states[0].name == "1"


def causal(batch: Any = "batch", time: Any = "time", last: bool = False) -> Any:
    """A causal convolution over `x [batch, 9, time]`, which keeps the last 4 steps; or the sum of what it gives."""
    conv = "filtered" if last else "y"
    return foreign.model(
        [
            node("Concat", ["cache", "x"], ["padded"], axis=2),
            node("Conv", ["padded", "W"], [conv]),
            *([node("ReduceSum", [conv, "two"], ["y"], keepdims=0)] if last else []),
            node("Slice", ["padded", "start", "end", "two"], ["cache_next"]),
        ],
        [("x", FLOAT, [batch, 9, time]), ("cache", FLOAT, [batch, 9, 4])],
        [("y", FLOAT, [batch, 6] if last else [batch, 6, time]), ("cache_next", FLOAT, [batch, 9, 4])],
        W=foreign.weights(40, 6, 9, 5),
        start=np.array([-4]),
        end=np.array([2**40]),
        two=np.array([2]),
    )


@pytest.mark.parametrize("flags", [[], ["--input", "x:time_axis=2", "--output", "y:batch_axis=0:time_axis=2"]])
def test_channels_before_time_are_turned_in_inputs_and_outputs(adopt: Adopt, flags: list[str]) -> None:
    made = causal()
    model = adopt(made, *flags)
    signature = model.document.signature
    assert (signature.time_axis, signature.predict_only) == (True, None)
    assert (signature.inputs[0].shape, signature.outputs[0].shape) == ((9,), (6,))
    states = {"cache": ("cache_next", np.zeros((1, 9, 4), np.float32))}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None, :, None]}, states)


def test_an_output_without_time_is_refused_with_its_axes(adopt: Adopt) -> None:
    with pytest.raises(ExportError) as refused:
        adopt(causal(last=True))
    told = str(refused.value)
    assert "output y has shape [2, 6] for 2 rows of 3 time steps: no axis of it is time" in told
    assert "--output y:time_axis=N" in told
    with pytest.raises(ExportError) as refused:
        adopt(causal(last=True), "--input", "x:time_axis=2", "--output", "y:time_axis=1")
    assert "axis 1 of it is not time" in str(refused.value)
    assert "=N" not in str(refused.value)


def window(opset: int, frames: Any = 3) -> Any:
    """The sum of each window of 3 frames of 4 numbers, added to a running state."""
    reduced = (
        node("ReduceSum", ["x"], ["m"], axes=[1], keepdims=0)
        if opset < 13
        else node("ReduceSum", ["x", "one"], ["m"], keepdims=0)
    )
    constants: dict[str, Any] = {"one": np.array([1])} if opset >= 13 else {}
    made = foreign.model(
        [reduced, node("Add", ["m", "h"], ["hn"]), node("Identity", ["hn"], ["y"])],
        [("x", FLOAT, ["b", frames, 4]), ("h", FLOAT, ["b", 4])],
        [("y", FLOAT, ["b", 4]), ("hn", FLOAT, ["b", 4])],
        opset,
        **constants,
    )
    made.ir_version = 4 if opset < 10 else 8
    return made


@pytest.mark.parametrize(
    ("opset", "context", "new"),
    [
        *((opset, "x=2:axis=1", (4,)) for opset in (7, 9, 10, 12, 17)),
        (17, "x=1:axis=1", (2, 4)),
        (9, "x=2", (3, 2)),
        (10, "x=2", (3, 2)),
    ],
)
def test_a_window_of_frames_or_samples_is_carried_in_any_opset(
    adopt: Adopt, opset: int, context: str, new: tuple[int, ...]
) -> None:
    made = window(opset)
    model = adopt(made, "--context", context)
    assert model.document.signature.inputs[0].shape == new
    entries, axis = int(context[2]), 1 if context.endswith("axis=1") else 2
    kept = np.zeros((1, entries, 4) if axis == 1 else (1, 3, entries), np.float32)
    steps = iter(drawn(model).reshape(-1, *new))
    before = [kept]

    def native(step: np.ndarray) -> dict[str, np.ndarray]:
        assert (next(steps) == step).all()
        whole = np.concatenate([before[0], step.reshape(1, *([1, 4] if new == (4,) else new))], axis)
        before[0] = whole[:, -entries:] if axis == 1 else whole[..., -entries:]
        count[0] += 1
        if count[0] % 6 == 0:  # the next row
            before[0] = kept
        return {"x": whole}

    count = [0]
    assert_served_as_in_a_plain_loop(model, made, native, {"h": ("hn", np.zeros((1, 4), np.float32))})


def test_a_context_along_the_time_axis_precedes_each_chunk(adopt: Adopt) -> None:
    made = foreign.model(
        [node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), node("Conv", ["t", "W"], ["c"]),
         node("Transpose", ["c"], ["y"], perm=[0, 2, 1])],
        [("x", FLOAT, ["batch", "time", 4])],
        [("y", FLOAT, ["batch", "steps", 5])],
        W=foreign.weights(41, 5, 4, 3),
    )  # fmt: skip
    model = adopt(made, "--context", "x=2:axis=1")
    signature = model.document.signature
    assert (signature.time_axis, signature.predict_only, signature.states[0].shape) == (True, None, (2, 4))
    x = drawn(model)
    y, _ = model.runtime.run(x, np.full(len(x), x.shape[1], np.int32), model.runtime.zeros(len(x)))
    padded = np.concatenate([np.zeros((len(x), 2, 4), np.float32), x], axis=1)
    W = foreign.weights(41, 5, 4, 3)
    wanted = [np.einsum("btc,oct->bo", padded[:, t : t + 3], W) for t in range(x.shape[1])]
    np.testing.assert_allclose(y, np.stack(wanted, 1), atol=1e-5)


def lengthy(dim: Any) -> Any:
    """`y = x + h` for rows longer than 20, as `length` says."""
    return foreign.model(
        [
            node("Greater", ["length", "twenty"], ["long"]),
            node("Cast", ["long"], ["factor"], to=FLOAT),
            node("Unsqueeze", ["factor", "one"], ["column"]),
            node("Add", ["x", "h"], ["sum"]),
            node("Mul", ["sum", "column"], ["hn"]),
            node("Concat", ["hn", "column"], ["y"], axis=1),  # which does not broadcast
        ],
        [("x", FLOAT, ["N", 4]), ("h", FLOAT, ["N", 4]), ("length", INT64, [dim])],
        [("y", FLOAT, ["N", 5]), ("hn", FLOAT, ["N", 4])],
        twenty=np.int64(20),
        one=np.array([1]),
    )


@pytest.mark.parametrize("length", [25, 15])
def test_a_number_fills_a_constant_of_as_many_rows_as_a_run_has(adopt: Adopt, length: int) -> None:
    made = lengthy("N")
    model = adopt(made, "--constant", f"length={length}")
    assert model.document.signature.batch is None
    states = {"h": ("hn", np.zeros((1, 4), np.float32))}
    fixed = {"length": np.array([length])}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None], **fixed}, states)


def test_a_number_fills_a_constant_of_a_dimension_of_its_own(adopt: Adopt) -> None:
    model = adopt(lengthy("M"), "--constant", "length=25")
    assert model.document.signature.batch == 1  # the graph takes one length, and so one row


def typed(type: int, state: int) -> Any:
    """`h.next = x + h` in one type, whatever types x and h have."""
    return foreign.model(
        [
            node("Cast", ["x"], ["x32"], to=FLOAT),
            node("Cast", ["h"], ["h32"], to=FLOAT),
            node("Mul", ["x32", "half"], ["small"]),
            node("Add", ["small", "h32"], ["sum"]),
            node("Cast", ["sum"], ["h.next"], to=state),
            node("Cast", ["sum"], ["y"], to=type),
        ],
        [("x", type, ["batch", 4]), ("h", state, ["batch", 4])],
        [("y", type, ["batch", 4]), ("h.next", state, ["batch", 4])],
        half=np.float32(0.5),
    )


TYPES = {"bool": (BOOL, "int32"), "float16": (HALF, "float32"), "float64": (DOUBLE, "float32"),
         "uint8": (TensorProto.UINT8, "int32"), "int16": (TensorProto.INT16, "int32")}  # fmt: skip


@pytest.mark.parametrize(("type", "state"), [*((name, name) for name in TYPES), ("bool", "float16"), ("uint8", "bool")])
def test_other_types_are_cast_at_both_ends(adopt: Adopt, capsys: Any, type: str, state: str) -> None:
    made = typed(TYPES[type][0], TYPES[state][0])
    model = adopt(made)
    assert f"x: {type} in the graph, {TYPES[type][1]} in the service" in " ".join(capsys.readouterr().out.split())
    signature = model.document.signature
    assert signature.inputs[0].dtype == signature.outputs[0].dtype == TYPES[type][1]
    assert signature.states[0].dtype == TYPES[state][1]
    native_type, native_state = (np.dtype(helper.tensor_dtype_to_np_dtype(TYPES[one][0])) for one in (type, state))
    states = {"h": ("h.next", np.zeros((1, 4), native_state))}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None].astype(native_type)}, states)


def test_bounds_that_a_type_does_not_hold_are_refused(adopt: Adopt) -> None:
    with pytest.raises(ExportError, match=r"bounds=0\.\.300: x is uint8"):
        adopt(typed(TensorProto.UINT8, FLOAT), "--input", "x:bounds=0..300")


@pytest.mark.parametrize("rows", ["batch", 1])
@pytest.mark.parametrize("type", [FLOAT, INT64, DOUBLE])
def test_a_state_of_one_number_without_axes_gives_each_row_a_run_of_its_own(adopt: Adopt, type: int, rows: Any) -> None:
    made = foreign.model(
        [
            node("Cast", ["count"], ["number"], to=FLOAT),
            node("Add", ["x", "number"], ["y"]),
            node("Add", ["count", "one"], ["count_next"]),
        ],
        [("x", FLOAT, [rows, 4]), ("count", type, [])],
        [("y", FLOAT, [rows, 4]), ("count_next", type, [])],
        one=np.ones((), helper.tensor_dtype_to_np_dtype(type)),
    )
    model = adopt(made)
    signature = model.document.signature
    assert (signature.batch, signature.states[0].shape) == (1, ())
    zero = np.zeros((), helper.tensor_dtype_to_np_dtype(type))
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None]}, {"count": ("count_next", zero)})


def test_a_state_without_a_batch_axis_is_reported(adopt: Adopt) -> None:
    made = foreign.model(
        [node("Add", ["x", "h"], ["y"]), node("Squeeze", ["y", "zero"], ["hn"])],
        [("x", FLOAT, [1, 4]), ("h", FLOAT, [4])],
        [("y", FLOAT, [1, 4]), ("hn", FLOAT, [4])],
        zero=np.array([0]),
    )
    with pytest.raises(ExportError, match="give --state h=hn:batch_axis=N, =none if it has no such axis"):
        adopt(made)
    model = adopt(made, "--state", "h=hn:batch_axis=none")
    states = {"h": ("hn", np.zeros(4, np.float32))}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None]}, states)


def fixed_time(batch_first: bool = False) -> Any:
    """A GRU of 10 fixed time steps, and a state of one row that no name gives away."""
    x = ["batch", 10, 3] if batch_first else [10, "batch", 3]
    return foreign.model(
        [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]) if batch_first else node("Identity", ["x"], ["xt"]),
            node("GRU", ["xt", "W", "R", "", "", "hidden_state"], ["Y", "66"], hidden_size=4),
            node("Squeeze", ["Y", "one"], ["output"]),
        ],
        [("x", FLOAT, x), ("hidden_state", FLOAT, [1, 1, 4])],
        [("output", FLOAT, [10, "o", 4]), ("66", FLOAT, [1, 1, 4])],
        one=np.array([1]),
        W=foreign.weights(9, 1, 12, 3),
        R=foreign.weights(10, 1, 12, 4),
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_fixed_time_axis_is_refused_at_once(adopt: Adopt, batch_first: bool) -> None:
    with pytest.raises(ExportError, match="x fixes its time axis at 10 steps: export it with a dynamic one"):
        adopt(fixed_time(batch_first))


def test_a_fixed_time_axis_can_be_one_step(adopt: Adopt) -> None:
    made = fixed_time()
    with pytest.raises(ExportError, match="give --state hidden_state=66"):
        adopt(made, "--input", "x:time_axis=none")
    model = adopt(made, "--input", "x:time_axis=none", "--state", "hidden_state=66")
    assert model.document.signature.inputs[0].shape == (10, 3)
    states = {"hidden_state": ("66", np.zeros((1, 1, 4), np.float32))}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[:, None]}, states)


def cell(states: tuple[str, ...] = ("h",)) -> Any:
    """A cell of PyTorch: its next states are all that it returns."""
    nodes = [node("MatMul", ["x", "W"], ["a"])]
    for name in states:
        nodes += [node("Add", ["a", name], [f"{name}.z"]), node("Tanh", [f"{name}.z"], [f"{name}.next"])]
    return foreign.model(
        nodes,
        [("x", FLOAT, ["batch", 9]), *((name, FLOAT, ["batch", 8]) for name in states)],
        [(f"{name}.next", FLOAT, ["batch", 8]) for name in states],
        W=foreign.weights(42, 9, 8),
    )


def test_a_cell_answers_with_its_next_state(adopt: Adopt) -> None:
    model = adopt(cell())
    x = drawn(model)
    y, states = model.runtime.run(x, np.full(len(x), x.shape[1], np.int32), model.runtime.zeros(len(x)))
    state = np.zeros((len(x), 8), np.float32)
    for t in range(x.shape[1]):
        state = np.tanh(x[:, t] @ foreign.weights(42, 9, 8) + state)
        np.testing.assert_allclose(y[:, t], state, atol=1e-5)
    np.testing.assert_array_equal(states[0], y[:, -1])


def test_outputs_are_those_that_are_named(adopt: Adopt) -> None:
    made = cell(("h", "c"))
    with pytest.raises(ExportError, match=r"say which one is the answer too, with --output NAME \(h.next, c.next\)"):
        adopt(made)
    with pytest.raises(ExportError, match=r"no such output: the candidates are h\.next, c\.next"):
        adopt(made, "--output", "y")
    signature = adopt(made, "--output", "h.next").document.signature
    assert [spec.name for spec in signature.outputs] == ["h.next.output"]
    assert [state.next_name for state in signature.states] == ["h.next", "c.next"]
    signature = adopt(foreign.symbols(), "--output", "top").document.signature
    assert [spec.name for spec in signature.outputs] == ["top"]


def test_features_without_a_batch_are_one_row(adopt: Adopt) -> None:
    made = foreign.model(
        [node("MatMul", ["x", "W"], ["a"]), node("Add", ["a", "h"], ["hn"]), node("Neg", ["hn"], ["y"])],
        [("x", FLOAT, [9]), ("h", FLOAT, [8])],
        [("y", FLOAT, [8]), ("hn", FLOAT, [8])],
        W=foreign.weights(43, 9, 8),
    )
    model = adopt(made)
    assert (model.document.signature.batch, model.document.signature.inputs[0].shape) == (1, (9,))
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step}, {"h": ("hn", np.zeros(8, np.float32))})


def after_a_layer(initial: str = "h0", x: Any = (None, None, 3)) -> Any:
    """A GRU behind a dense layer, time first, whose dimensions have no names; or one that starts from zeros."""
    return foreign.model(
        [
            node("MatMul", ["x", "L"], ["a"]),
            node("Add", ["a", "bias"], ["b"]),
            node("Relu", ["b"], ["c"]),
            node("GRU", ["c", "W", "R", "", "", initial], ["yt", "last"], hidden_size=4),
            node("Squeeze", ["yt", "one"], ["y"]),
            node("Identity", ["last"], ["hn"]) if initial else node("Add", ["h0", "h0"], ["hn"]),
        ],
        [("x", FLOAT, list(x)), ("h0", FLOAT, [1, None, 4])],
        [("y", FLOAT, [None, None, 4]), ("hn", FLOAT, [1, None, 4])],
        L=foreign.weights(44, 3, 3),
        bias=foreign.weights(45, 3),
        one=np.array([1]),
        W=foreign.weights(46, 1, 12, 3),
        R=foreign.weights(47, 1, 12, 4),
    )


def test_the_time_axis_is_that_of_a_gru_behind_other_layers(adopt: Adopt) -> None:
    made = after_a_layer()
    model = adopt(made)
    assert (model.document.signature.time_axis, model.document.signature.batch) == (True, None)
    states = {"h0": ("hn", np.zeros((1, 1, 4), np.float32))}
    assert_served_as_in_a_plain_loop(model, made, lambda step: {"x": step[None, None]}, states)


def test_a_gru_without_a_state_runs_over_something_else_than_time(adopt: Adopt) -> None:
    with pytest.raises(ExportError, match="x fixes its time axis at 10 steps"):
        adopt(after_a_layer(x=(10, None, 3)))
    model = adopt(after_a_layer("", x=(10, None, 3)), "--input", "x:batch_axis=1")
    assert model.document.signature.inputs[0].shape == (10, 3)


def test_an_input_flag_with_options_names_no_other_inputs(adopt: Adopt) -> None:
    made = foreign.symbols()
    flags = ["--input", "symbol:bounds=1..3"]
    assert [spec.bounds for spec in adopt(made, *flags).document.signature.inputs] == [(1, 3), None]


MESSAGES: dict[str, tuple[Any, list[str], str]] = {
    "no state among one input": (foreign.both_ways(), [], "x is the only input: export the model with its states"),
    "a constant of another size": (
        foreign.frames(1),
        ["--constant", "x=[1,2]"],
        "its shape is [2], the input's [1, 3]",
    ),
    "a context of a state": (foreign.frames(), ["--context", "s=1"], "s is a state, and no input of a time step"),
    "a context of the batch": (foreign.frames(), ["--context", "x=1:axis=0"], "axis 0 of x is its batch"),
    "a context of no axis": (foreign.frames(), ["--context", "x=1:axis=2"], "x [batch, 3] has no axis 2"),
    "an axis too many": (foreign.frames(), ["--input", "x:time_axis=2"], "x [batch, 3]: it has no axis 2"),
    "time in one axis": (foreign.letters(), ["--input", "ids:time_axis=0"], "must be two of its axes"),
    "lengths": (lengthy("N"), [], "or --constant length=VALUE if it is always the same"),
    "a fixed axis said to be time": (
        foreign.frames(),
        ["--input", "x:time_axis=1"],
        "x fixes its time axis at 3 steps",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_refusal_says_what_is_wrong(adopt: Adopt, case: str) -> None:
    made, flags, told = MESSAGES[case]
    with pytest.raises(ExportError) as refused:
        adopt(made, *flags)
    assert told in str(refused.value)
    assert str(refused.value).count("\n") == 1
    for word in (".cc", ".h:", "(of )", "[ONNXRuntimeError]"):
        assert word not in str(refused.value)
