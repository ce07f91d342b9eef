"""`cellserve adopt`: foreign models of all kinds come out as they must be served, or are refused in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, external_data_helper, helper
from onnx.helper import make_node as node

from cellserve.export.adopt.state_matching import Port, find_pairs
from cellserve.export.errors import ExportError
from cellserve.models.signature import Signature
from cellserve.service.runtime.shape_policy import POLICIES
from tests import foreign
from tests.export.adopting import Adopt
from tests.foreign import FLOAT, INT64
from tests.kinds import COUNTING, DEEP, FRAMES, LETTERS, LSTM, SYMBOLS

ONE = {"batch": 1}


def by_hand(made: Any) -> Any:
    return ort.InferenceSession(made.SerializeToString())


@pytest.mark.parametrize(
    ("name", "following"),
    [
        ("h", "hn"), ("c", "cn"), ("h0", "hn"), ("h_0", "h_n"), ("state", "stateN"), ("past_x", "present_x"),
        ("past_key.0", "present_key.0"), ("x_in", "x_out"), ("h", "h.next"), ("hidden", "new_hidden"),
        ("prevState", "nextState"), ("cache_in_3", "cache_out_3"), ("initial_h", "final_h"), ("lstm/h", "lstm/h_next"),
        ("n", "n.next"), ("cache_x", "cache_x_next"), ("cache_last_time", "cache_last_time_next"),
        ("cache_last_channel_len", "cache_last_channel_next_len"),
    ],
)  # fmt: skip
def test_next_states_are_found_by_their_names(name: str, following: str) -> None:
    inputs = [Port("x", "float32", ("batch", 4)), Port(name, "float32", ("batch", 4))]
    outputs = [Port("y", "float32", ("batch", 4)), Port(following, "float32", None)]
    assert find_pairs(inputs, outputs) == {name: following}


@pytest.mark.parametrize(
    ("name", "following", "dims", "type"),
    [
        ("h", "c", (1, 4), "float32"),
        ("past_key.0", "present_key.1", (1, 4), "float32"),
        ("h", "hn", (1, 5), "float32"),
        ("h", "hn", (1, 4, 4), "float32"),
        ("h", "hn", (1, 4), "int64"),
        ("input", "output", (1, 4), "float32"),
        ("h", "h", (1, 4), "float32"),
    ],
)
def test_tensors_that_differ_in_name_shape_or_type_are_not_paired(
    name: str, following: str, dims: Any, type: str
) -> None:
    assert find_pairs([Port(name, "float32", (1, 4))], [Port(following, type, dims)]) == {}


def test_several_possible_next_states_are_refused_with_the_flag_to_give() -> None:
    outputs = [Port("h_out", "float32", (1, 4)), Port("hn", "float32", (1, 4))]
    with pytest.raises(ExportError, match="h could become h_out or hn: say which with --state h=h_out"):
        find_pairs([Port("h", "float32", (1, 4))], outputs)


KINDS: dict[str, tuple[Any, list[str], Signature]] = {
    "frames": (foreign.frames(), [], FRAMES),
    "rank 3, batch axis 1": (foreign.deep(), [], DEEP),
    "as told": (foreign.deep(), ["--state", "state=stateN:batch_axis=1", "--input", "input"], DEEP),
    "several inputs and outputs, bounds of a table": (foreign.symbols(), [], SYMBOLS),
    "a state of one integer": (foreign.counting(), [], COUNTING),
    "symbols": (foreign.letters(), [], LETTERS),
    "bounds as told": (
        foreign.letters(),
        ["--input", "ids:bounds=1..3"],
        LETTERS.model_copy(update={"inputs": (LETTERS.inputs[0].model_copy(update={"bounds": (1, 3)}),)}),
    ),
    "a time axis": (foreign.lstm(), [], LSTM),
    "fixed batch": (foreign.frames(1), [], FRAMES.model_copy(update=ONE)),
    "fixed batch, rank 3": (foreign.deep(1), [], DEEP.model_copy(update=ONE)),
    "fixed batch, a time axis": (foreign.lstm(1), ["--state", "h=hn:batch_axis=1", "--state", "c=cn:batch_axis=1"],
                                 LSTM.model_copy(update=ONE)),
    "fixed by hand": (foreign.frames("n"), ["--dim", "n=1"], FRAMES.model_copy(update=ONE)),
    "rows that mix": (foreign.deep(mixed=True), [], DEEP.model_copy(update=ONE)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_model_is_adopted_as_it_must_be_served(adopt: Adopt, kind: str) -> None:
    made, flags, wanted = KINDS[kind]
    model = adopt(made, *flags)
    assert model.document.signature.model_copy(update={"default_output": "last"}) == wanted
    assert model.exactness.proved, model.exactness.why
    assert model.document.parity["original"] <= 1e-5
    assert model.document.provenance["source"] == "model.onnx"


def test_a_model_that_looks_ahead_predicts_whole_sequences_only(adopt: Adopt) -> None:
    made = foreign.lstm(looks_ahead=True)
    model = adopt(made)
    assert "it looks beyond a step" in (model.document.signature.predict_only or "")
    x = np.random.default_rng(1).normal(size=(2, 9, 3)).astype(np.float32)
    y, _ = model.runtime.run(x, np.full(2, 9, np.int32), model.runtime.zeros(2))
    zeros = {name: np.zeros((1, 2, 4), np.float32) for name in "hc"}
    session = by_hand(made)
    np.testing.assert_allclose(y, session.run(["out"], {"x": x, **zeros})[0], atol=1e-5)


def unpacked() -> Any:
    """An LSTM before a MatMul by weights that ONNX Runtime cannot pack, so that one row has a kernel of its own."""
    units = 48
    return foreign.model(
        [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            node("LSTM", ["xt", "W", "R", "", "", "h", "c"], ["yt", "hn", "cn"], hidden_size=units),
            node("Squeeze", ["yt", "one"], ["ys"]),
            node("Transpose", ["ys"], ["yb"], perm=[1, 0, 2]),
            node("ReduceMax", ["x"], ["largest"], keepdims=0),
            node("Mul", ["largest", "nought"], ["zero"]),
            node("Add", ["P", "zero"], ["weights"]),
            node("MatMul", ["yb", "weights"], ["out"]),
        ],
        [("x", FLOAT, ["batch", "time", 3]), *((name, FLOAT, [1, "batch", units]) for name in "hc")],
        [("out", FLOAT, ["batch", "time", 5]), *((f"{name}n", FLOAT, [1, "batch", units]) for name in "hc")],
        one=np.array([1], np.int64),
        nought=np.float32(0),
        W=foreign.weights(9, 1, 4 * units, 3),
        R=foreign.weights(10, 1, 4 * units, units),
        P=foreign.weights(11, units, 5),
    )


def test_a_model_whose_chunks_differ_in_the_last_bits_is_exact_in_padded_runs(adopt: Adopt) -> None:
    model = adopt(unpacked())
    assert model.exactness.proved
    assert model.exactness.shapes in [policy.name for policy in POLICIES[1:]]
    assert f"in {model.exactness.shapes}, since" in model.document.exactness.why


def test_a_model_that_no_shapes_make_exact_is_stepped_one_time_step_at_a_time(
    adopt: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellserve.export.adopt.adopt.POLICIES", POLICIES[:1])
    model = adopt(unpacked())
    assert (model.exactness.proved, model.document.signature.predict_only) == (False, None)
    assert "one row and one time step at a time" in model.exactness.why


@pytest.mark.parametrize("shape", [[1, 4], [1, -1]])
def test_a_graph_that_says_any_number_of_rows_and_takes_one_is_run_row_by_row(adopt: Adopt, shape: list[int]) -> None:
    made = foreign.model(
        [node("Add", ["x", "h"], ["sum"]), node("Reshape", ["sum", "shape"], ["y"]), node("Identity", ["y"], ["hn"])],
        [("x", FLOAT, ["batch", 4]), ("h", FLOAT, ["batch", 4])],
        [("y", FLOAT, [1, "n"]), ("hn", FLOAT, [1, "n"])],
        shape=np.array(shape, np.int64),
    )
    assert adopt(made).document.signature.batch == 1


def time_first(batch: Any = "batch") -> Any:
    """As PyTorch exports an LSTM by default: x `[time, batch, 3]`."""
    return foreign.model(
        [
            node("LSTM", ["x", "W", "R", "", "", "h0", "c0"], ["yt", "hn", "cn"], hidden_size=4),
            node("Squeeze", ["yt", "one"], ["output"]),
        ],
        [("x", FLOAT, ["time", batch, 3]), ("h0", FLOAT, [1, batch, 4]), ("c0", FLOAT, [1, batch, 4])],
        [("output", FLOAT, ["time", batch, 4]), ("hn", FLOAT, [1, batch, 4]), ("cn", FLOAT, [1, batch, 4])],
        one=np.array([1], np.int64),
        W=foreign.weights(9, 1, 16, 3),
        R=foreign.weights(10, 1, 16, 4),
    )


@pytest.mark.parametrize(
    ("batch", "flags"), [("batch", []), ("batch", ["--input", "x:time_axis=0"]), (1, ["--input", "x:time_axis=0"])]
)
def test_a_model_with_time_before_batch_is_transposed(adopt: Adopt, batch: Any, flags: list[str]) -> None:
    model, other = adopt(time_first(batch), *flags), foreign.lstm()
    signature = model.document.signature
    assert (signature.time_axis, signature.batch) == (True, None if batch == "batch" else 1)
    assert signature.inputs[0].shape == (3,)
    x = np.random.default_rng(1).normal(size=(2, 9, 3)).astype(np.float32)
    y, _ = model.runtime.run(x, np.array([9, 4], np.int32), model.runtime.zeros(2))
    zeros = {name: np.zeros((1, 2, 4), np.float32) for name in "hc"}
    wanted = by_hand(other).run(["out"], {"x": x, **zeros})[0]
    np.testing.assert_allclose(y[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(y[1, :4], wanted[1, :4], atol=1e-5)


def with_constants() -> Any:
    """`y = gain x`, and s, the x before, added where a flag is set; x has no batch axis, and s one of size one."""
    branches = {
        "then_branch": [node("Squeeze", ["s", "zero"], ["s1"]), node("Add", ["louder", "s1"], ["chosen"])],
        "else_branch": [node("Identity", ["louder"], ["chosen"])],
    }
    output = helper.make_tensor_value_info("chosen", FLOAT, None)
    graphs = {name: helper.make_graph(nodes, name, [], [output]) for name, nodes in branches.items()}
    return foreign.model(
        [
            node("Mul", ["x", "gain"], ["louder"]),
            node("If", ["flag"], ["y"], **graphs),
            node("Unsqueeze", ["x", "zero"], ["s_next"]),
        ],
        [("x", FLOAT, [4]), ("s", FLOAT, [1, 4]), ("gain", FLOAT, [4]), ("flag", TensorProto.BOOL, [])],
        [("y", FLOAT, [4]), ("s_next", FLOAT, [1, 4])],
        zero=np.array([0], np.int64),
    )


def test_constants_are_baked_into_the_graph_and_what_it_holds(adopt: Adopt, capsys: Any) -> None:
    flags = "--constant", "gain=[1, 2, 3, 4]", "--constant", "flag=true", "--input", "x:batch_axis=none"
    model = adopt(with_constants(), *flags)
    assert "gain = [1.0, 2.0, 3.0, 4.0]" in capsys.readouterr().out
    x = np.ones((1, 2, 4), np.float32)
    y, _ = model.runtime.run(x, np.array([2], np.int32), model.runtime.zeros(1))
    assert y[0].tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]


def with_default(value: float) -> Any:
    made = foreign.frames(1)
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.full((1, 4), value, np.float32), "s"))
    return made


def test_a_state_with_a_default_of_zeros_is_carried_all_the_same(adopt: Adopt) -> None:
    assert [state.name for state in adopt(with_default(0)).document.signature.states] == ["s"]


def test_a_context_of_the_last_entries_is_carried_as_a_state(adopt: Adopt) -> None:
    made = foreign.model(
        [node("ReduceSum", ["x", "one"], ["y"], keepdims=1)],
        [("x", FLOAT, ["batch", "samples"])],
        [("y", FLOAT, ["batch", 1])],
        one=np.array([1], np.int64),
    )
    model = adopt(made, "--context", "x=2", "--dim", "samples=5")
    assert model.document.signature.inputs[0].shape == (3,)
    assert [(state.name, state.shape) for state in model.document.signature.states] == [("x.context", (2,))]
    x = np.arange(1, 13, dtype=np.float32).reshape(1, 4, 3)
    y, _ = model.runtime.run(x, np.array([4], np.int32), model.runtime.zeros(1))
    assert y.ravel().tolist() == [1 + 2 + 3, 2 + 3 + 4 + 5 + 6, 5 + 6 + 7 + 8 + 9, 8 + 9 + 10 + 11 + 12]


def test_external_data_beside_the_file_is_taken_in(adopt: Adopt, tmp_path: Path) -> None:
    made = foreign.frames()
    external_data_helper.convert_model_to_external_data(made, location="weights.bin", size_threshold=0)
    onnx.save(made, tmp_path / "model.onnx")
    assert adopt((tmp_path / "model.onnx").read_bytes()).document.signature.inputs == FRAMES.inputs


def edited(made: Any, edit: Callable[[Any], Any]) -> Any:
    edit(made)
    return made


def in_a_domain_of_its_own(made: Any) -> None:
    made.graph.node[3].domain = "my.lab"
    made.opset_import.append(helper.make_opsetid("my.lab", 1))


def elsewhere(location: str) -> Any:
    made = foreign.frames()
    tensor = made.graph.initializer[0]
    external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return made


def unpaired() -> Any:
    made = foreign.deep()
    made.graph.output[1].name = made.graph.node[12].output[0] = "something"
    return made


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "not ONNX": (b"no model", [], "not an ONNX file"),
    "an unpaired state": (unpaired(), [], "state [2, batch, 4] looks like a state, and no output is its next state"),
    "an input without a role": (foreign.frames(), ["--input", "s"], "x [batch, 3] is no --input"),
    "no state": (foreign.both_ways(), [], "no state was found"),
    "states of other shapes": (foreign.frames(), ["--state", "s=y"], "s is float32 [batch, 4], y is"),
    "an unknown state": (foreign.frames(), ["--state", "t=y"], "no such input 't'"),
    "an unknown output": (foreign.frames(), ["--state", "s=t"], "no such output 't'"),
    "an unknown input": (foreign.frames(), ["--input", "t"], "no such input 't'"),
    "an unknown constant": (foreign.frames(), ["--constant", "t=1"], "the graph has no such input"),
    "a constant that is none": (foreign.frames(1), ["--constant", "x=one"], "in JSON"),
    "a constant of another shape": (foreign.frames(1), ["--constant", "x=[1, 2]"], "in JSON"),
    "an unknown dimension": (foreign.frames(), ["--dim", "t=1"], "no such dimension"),
    "a state of dynamic size": (
        foreign.model([node("Add", ["x", "h"], ["hn"]), node("Identity", ["hn"], ["y"])],
                      [("x", FLOAT, ["batch", 3]), ("h", FLOAT, ["batch", "units"])],
                      [("y", FLOAT, ["batch", 3]), ("hn", FLOAT, ["batch", "units"])]),
        [], "give --dim units=VALUE"),
    "a scalar left over": (
        foreign.model([node("Mul", ["x", "sr"], ["y"]), node("Identity", ["x"], ["hn"]), node("Neg", ["h"], ["z"])],
                      [("x", FLOAT, ["batch", 3]), ("h", FLOAT, ["batch", 3]), ("sr", FLOAT, [])],
                      [("y", FLOAT, ["batch", 3]), ("hn", FLOAT, ["batch", 3]), ("z", FLOAT, ["batch", 3])]),
        [], "give its value with --constant sr=VALUE"),
    "a state that does not keep its shape": (
        foreign.model([node("Concat", ["h", "x"], ["hn"], axis=1), node("Identity", ["x"], ["y"])],
                      [("x", FLOAT, ["batch", 3]), ("h", FLOAT, ["batch", 3])],
                      [("y", FLOAT, ["batch", 3]), ("hn", FLOAT, ["batch", "more"])]),
        [], "it cannot be fed back"),
    "integers without bounds": (
        foreign.model([node("Cast", ["x"], ["y"], to=FLOAT), node("Add", ["h", "y"], ["hn"])],
                      [("x", INT64, ["batch", 3]), ("h", FLOAT, ["batch", 3])],
                      [("y", FLOAT, ["batch", 3]), ("hn", FLOAT, ["batch", 3])]),
        [], "give --input x:bounds=FIRST..LAST"),
    "another type": (
        foreign.model([node("Add", ["x", "h"], ["hn"]), node("Identity", ["x"], ["y"])],
                      [("x", TensorProto.UINT64, ["batch", 3]), ("h", TensorProto.UINT64, ["batch", 3])],
                      [("y", TensorProto.UINT64, ["batch", 3]), ("hn", TensorProto.UINT64, ["batch", 3])]),
        [], "x is uint64"),
    "custom operators": (
        edited(foreign.frames(), in_a_domain_of_its_own),
        [], "custom operators, which are not loaded: my.lab::Tanh"),
    "a later opset": (
        edited(foreign.frames(), lambda made: setattr(made.opset_import[0], "version", 99)), [], "its opset is 99"),
    "a later format": (edited(foreign.frames(), lambda made: setattr(made, "ir_version", 99)), [], "IR version"),
    "data outside the folder": (elsewhere("../weights.bin"), [], "which is not a file in the model's folder"),
    "data in the file system": (elsewhere("/etc/hostname"), [], "which is not a file in the model's folder"),
    "data that is missing": (elsewhere("gone.bin"), [], "which is not a file in the model's folder"),
    "random numbers": (
        foreign.model([node("RandomNormalLike", ["x"], ["noise"]), node("Add", ["h", "noise"], ["hn"]),
                       node("Identity", ["hn"], ["y"])],
                      [("x", FLOAT, ["batch", 3]), ("h", FLOAT, ["batch", 3])],
                      [("y", FLOAT, ["batch", 3]), ("hn", FLOAT, ["batch", 3])]),
        [], ""),
    "a state that begins with numbers": (with_default(0.5), [], "state s begins with values other than zero"),
    "a model of our own": (foreign.described(foreign.frames(), FRAMES), [], "already a model of cellserve"),
    "labels of another number": (foreign.frames(), ["--labels", "a,b,c"], "3 labels for an output of shape [2]"),
    "a rollout into another shape": (foreign.frames(), ["--rollout", "value"], "--rollout value: the output [2]"),
    "audio without a rate": (foreign.frames(), ["--task", "audio"], "--task audio: an audio model has a sample rate"),
    "a context as long as the step": (foreign.frames(), ["--context", "x=3"], "give from 1 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_line(adopt: Adopt, case: str) -> None:
    made, flags, told = REFUSED[case]
    with pytest.raises(ExportError) as refused:
        adopt(made, *flags)
    message = str(refused.value)
    assert message.startswith("cellserve adopt: ")
    assert message.count("\n") == 1, message
    assert told in message


def test_a_next_version_that_clients_must_change_for_says_so(adopt: Adopt, capsys: Any) -> None:
    adopt(foreign.frames())
    adopt(foreign.frames())
    assert "warning" not in capsys.readouterr().out
    adopt(foreign.deep())
    told = " ".join(capsys.readouterr().out.split())
    assert "carries state [2, 4] float32 (version 2: s [4] float32): clients of mine must change" in told
    assert "if that is not intended, give it another --name" in told


def test_adopting_imports_no_tensorflow_and_prints_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "deep.onnx"
    onnx.save(foreign.deep(), path)
    code = (
        "import sys; from cellserve.cli import main; status = main(sys.argv[1:]); "
        "assert 'tensorflow' not in sys.modules; sys.exit(status)"
    )
    flags = ["--name", "deep", "--models", str(tmp_path / "artifacts")]
    ran = subprocess.run(
        [sys.executable, "-c", code, "adopt", str(path), *flags], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    for told in ("state → stateN [2, 4], batch at axis 1", "bit identity", "step it in sessions"):
        assert told in ran.stdout.replace("\n", " "), ran.stdout
