"""Converts one step of a network with tf2onnx into a plain graph without loops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import tensorflow as tf
import tf2onnx
from onnx import helper, numpy_helper
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from cellserve.export.errors import ExportError, first_line
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.builder import graphs

OPSET = 18  # the newest that tf2onnx writes
BATCH = "batch"  # the symbolic size of what has a row for each row of the batch
_BATCHES = (5, 7)


@dataclass(frozen=True, slots=True)
class StepGraph:
    """One step as ONNX nodes: tensor names of its ends, and what is known of the shapes between."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, onnx.TensorProto]
    inputs: list[str]  # [batch, *features]
    states: list[str]  # of the recurrences that were traced through, [batch, *shape]
    from_left_out: list[str]  # outputs of the recurrences that were left out
    outputs: list[str]
    next_states: list[str]
    into_left_out: list[list[str]]  # for each its input, and its mask where it is masked
    shapes: dict[str, tuple[int | str, ...]]  # where they are the same at every batch size, but for the batch itself
    types: dict[str, int]

    def has_rows(self, tensor: str) -> bool:
        """Says whether the tensor is known to have the batch as its first axis."""
        return self.shapes.get(tensor, ())[:1] == (BATCH,)


def trace_step(network: StatefulNetwork, leave_out: Callable[[Any], bool]) -> StepGraph:
    """Traces one step with TensorFlow and converts it with tf2onnx.

    Args:
        network: The network, its states laid open.
        leave_out: Says of a cell whether it is to stand as an operator of its own, outside the traced step.
    """
    specs = [tf.TensorSpec([None, *spec.shape], spec.dtype) for spec in network.inputs]
    state_specs, left_out_specs, order, counts = [], [], [], []
    for recurrence in network.recurrences:
        if leave_out(recurrence.cell):
            left_out_specs.append(tf.TensorSpec([None, *recurrence.output_shape], "float32"))
            order.append(("left out", len(left_out_specs) - 1))
            counts.append(1 + recurrence.masked)
        else:
            for state in recurrence.states:
                state_specs.append(tf.TensorSpec([None, *state.shape], state.dtype))
                order.append(("state", len(state_specs) - 1))
    first, second = len(specs), len(specs) + len(state_specs)

    def step(*tensors: Any) -> list[Any]:
        ends = {"state": tensors[first:second], "left out": tensors[second:]}
        result = network.step(tensors[:first], [ends[kind][place] for kind, place in order], leave_out)
        into_left_out = [tensor for group in result.into_left_out for tensor in group]
        return [tf.identity(tensor) for tensor in (*result.outputs, *result.states, *into_left_out)]

    model = convert(step, [*specs, *state_specs, *left_out_specs], network.model)
    return _plain(model, len(specs), len(network.outputs), len(state_specs), counts)


def convert(function: Callable[..., Any], specs: list[Any], network: Any) -> onnx.ModelProto:
    """Converts a TensorFlow function of these inputs with tf2onnx; the model's ends are in the function's order.

    Args:
        function: Takes and gives tensors.
        specs: Of its inputs.
        network: The Keras model that it is made of, whose layers are named where they cannot be converted.

    Raises:
        ExportError: Something in it has no operator in ONNX.

    It is frozen here because tf2onnx's own `from_function` takes every constant tensor that a layer holds (the mean of
    a `Normalization`, say) for an input of the model.
    """
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL + 1)  # what it cannot do is said below
    named = [tf.TensorSpec(spec.shape, spec.dtype, name=f"in{place}") for place, spec in enumerate(specs)]
    concrete = tf.function(function, autograph=False).get_concrete_function(*named)
    frozen = convert_variables_to_constants_v2(concrete, lower_control_flow=False, aggressive_inlining=True)
    try:
        model, _ = tf2onnx.convert.from_graph_def(
            frozen.graph.as_graph_def(add_shapes=True),
            input_names=[f"in{place}:0" for place in range(len(specs))],
            output_names=[tensor.name for tensor in frozen.outputs],
            opset=OPSET,
            custom_op_handlers={"Select": (_write_select, []), "SelectV2": (_write_select, [])},
        )
    except Exception as error:
        raise ExportError(f"tf2onnx cannot convert the network: {first_line(error)}") from None
    for graph in graphs(model.graph):
        _write_erfc(graph)
    for node in model.graph.node:
        if not onnx.defs.has(node.op_type, OPSET, node.domain):
            raise ExportError(
                f"{_layer_of(node, network)} has TensorFlow's {node.op_type}, for which tf2onnx has no operator of "
                f"ONNX: write that layer or cell with other operations of keras.ops"
            )
    return model


def _write_select(graph: Any, node: Any, *_: Any) -> None:
    """Writes TensorFlow's Select as `Where`, one of tf2onnx's handlers of operators.

    tf2onnx has two ways of its own: `Where`, and `condition * x + (1 - condition) * y`, which it takes wherever it sees
    no infinity or NaN among the constants. That gives NaN wherever the branch that is not taken is not finite, which is
    just what a guard (`where(isfinite(1 / x), 1 / x, 0)`) is for. The products are right for integers and truth values,
    of which ONNX Runtime's `Where` knows but some types.
    """
    number = graph.get_dtype(node.output[0])
    if number in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16):
        node.set_attr("handles_nan", True)
    tf2onnx.onnx_opset.controlflow.Select.version_9(graph, node)


def _write_erfc(graph: onnx.GraphProto) -> None:
    """Writes TensorFlow's Erfc, which tf2onnx does not know, as 1 - Erf: `gelu` is made of it."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "Erfc":
            graph.node.append(node)
            continue
        one, erf = f"{node.output[0]}/one", f"{node.output[0]}/erf"
        graph.node.append(helper.make_node("Constant", [], [one], one, value=numpy_helper.from_array(np.float32(1))))
        graph.node.append(helper.make_node("Erf", node.input, [erf], erf))
        graph.node.append(helper.make_node("Sub", [one, erf], node.output, node.name))


def _layer_of(node: onnx.NodeProto, network: Any) -> str:
    """Names the layer that a node was traced from: TensorFlow names it after the layer, with a number of its own."""
    layers = {layer.name: layer for layer in network._flatten_layers(include_self=False)}
    for part in node.name.split("/"):
        layer = layers.get(part) or layers.get(part.rpartition("_")[0])
        if layer is not None:
            return f"layer {layer.name!r} ({type(layer).__name__})"
    return repr(node.name)


def _plain(model: onnx.ModelProto, inputs: int, outputs: int, states: int, counts: list[int]) -> StepGraph:
    """Strips what tf2onnx leaves around a step: Identity nodes, axes that are added and taken away again."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    same: dict[str, str] = {}  # a name: the name that it is another word for
    producers: dict[str, onnx.NodeProto] = {}
    nodes = []

    def true_name(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = true_name(name)
        before = producers.get(node.input[0]) if node.input else None
        if node.op_type == "Identity":
            same[node.output[0]] = node.input[0]
        elif node.op_type == "Constant":
            value = next(attribute.t for attribute in node.attribute if attribute.name == "value")
            constants[node.output[0]] = onnx.TensorProto.FromString(value.SerializeToString())
            constants[node.output[0]].name = node.output[0]
        elif (
            before is not None
            and {node.op_type, before.op_type} == {"Squeeze", "Unsqueeze"}
            and _axes(node, constants) == _axes(before, constants)
        ):
            same[node.output[0]] = before.input[0]
        else:
            nodes.append(node)
            producers.update(dict.fromkeys(node.output, node))
    ins = [value.name for value in graph.input]
    outs = [true_name(value.name) for value in graph.output]
    needed = _needed(nodes, outs)
    nodes = [node for node in nodes if any(name in needed for name in node.output)]
    into = iter(outs[outputs + states :])
    shapes, types = _seen(model, nodes, constants)
    return StepGraph(
        nodes=nodes,
        constants={name: tensor for name, tensor in constants.items() if name in needed},
        inputs=ins[:inputs],
        states=ins[inputs : inputs + states],
        from_left_out=ins[inputs + states :],
        outputs=outs[:outputs],
        next_states=outs[outputs : outputs + states],
        into_left_out=[[next(into) for _ in range(count)] for count in counts],
        shapes=shapes,
        types=types,
    )


def _axes(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> tuple[int, ...] | None:
    if len(node.input) < 2 or node.input[1] not in constants:
        return None
    return tuple(int(axis) for axis in np.atleast_1d(numpy_helper.to_array(constants[node.input[1]])))


def _needed(nodes: list[onnx.NodeProto], outs: list[str]) -> set[str]:
    needed = set(outs)
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
    return needed


def _seen(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: dict[str, onnx.TensorProto]
) -> tuple[dict[str, tuple[int | str, ...]], dict[str, int]]:
    """Runs the step at two batch sizes and looks at every tensor: shape inference loses the batch at a `Slice`."""
    names = [value.name for value in model.graph.input] + [name for node in nodes for name in node.output if name]
    everything = [onnx.ValueInfoProto(name=name) for node in nodes for name in node.output if name]
    graph = helper.make_graph(nodes, "step", list(model.graph.input), everything, list(constants.values()))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    step = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    # A graph of no nodes is none that can be run: all of the step was left out.
    session = ort.InferenceSession(step.SerializeToString(), options, ["CPUExecutionProvider"]) if nodes else None
    seen: list[list[np.ndarray]] = []
    for batch in _BATCHES:
        feed = {}
        for value in model.graph.input:
            tensor = value.type.tensor_type
            shape = [batch, *(dim.dim_value for dim in tensor.shape.dim[1:])]
            feed[value.name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        seen.append([*feed.values(), *(session.run(None, feed) if session else ())])
    shapes, types = {}, {}
    for name, few, more in zip(names, *seen, strict=True):
        types[name] = helper.np_dtype_to_tensor_dtype(few.dtype)
        if few.shape[:1] == _BATCHES[:1] and more.shape[:1] == _BATCHES[1:] and few.shape[1:] == more.shape[1:]:
            shapes[name] = (BATCH, *few.shape[1:])
        elif few.shape == more.shape:
            shapes[name] = few.shape
    return shapes, types
