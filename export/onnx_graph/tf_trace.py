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
from onnx import helper, numpy_helper

from cellserve.export.errors import ExportError, first_line
from cellserve.export.keras_model.keras_private import all_layers
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.tensorflow_private import freeze
from cellserve.export.onnx_graph.tf2onnx_handlers import HANDLERS, REWRITERS
from cellserve.export.onnx_graph.tf2onnx_private import convert_graph

OPSET = 18  # newest opset that tf2onnx writes
BATCH = "batch"  # symbolic size of an axis with one entry per row of the batch
_BATCHES = (5, 7)


@dataclass(frozen=True, slots=True)
class StepGraph:
    """One step as ONNX nodes, with the names of its inputs and outputs and the known shapes of its tensors."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, onnx.TensorProto]
    inputs: list[str]  # [batch, *features]
    states: list[str]  # states of the recurrences inside the trace, [batch, *shape]
    from_excluded: list[str]  # outputs of the excluded recurrences
    outputs: list[str]
    next_states: list[str]
    to_excluded: list[list[str]]  # for each excluded recurrence its input, and its mask if it is masked
    shapes: dict[str, tuple[int | str, ...]]  # known shapes: equal at every batch size, except for the batch axis
    types: dict[str, int]

    def has_rows(self, tensor: str) -> bool:
        """Whether the tensor is known to have the batch as its first axis."""
        return self.shapes.get(tensor, ())[:1] == (BATCH,)


def trace_step(network: StatefulNetwork, exclude: Callable[[Any], bool]) -> StepGraph:
    """Traces one step with TensorFlow and converts it with tf2onnx.

    Args:
        network: The network.
        exclude: Whether a cell becomes an operator of its own, outside the traced step.
    """
    specs = [tf.TensorSpec([None, *spec.shape], spec.dtype) for spec in network.inputs]
    state_specs, excluded_specs, order, counts = [], [], [], []
    for recurrence in network.recurrences:
        if exclude(recurrence.cell):
            excluded_specs.append(tf.TensorSpec([None, *recurrence.output_shape], "float32"))
            order.append(("excluded", len(excluded_specs) - 1))
            counts.append(1 + recurrence.masked)
        else:
            for state in recurrence.states:
                state_specs.append(tf.TensorSpec([None, *state.shape], state.dtype))
                order.append(("state", len(state_specs) - 1))
    first, second = len(specs), len(specs) + len(state_specs)

    def step(*tensors: Any) -> list[Any]:
        given = {"state": tensors[first:second], "excluded": tensors[second:]}
        result = network.step(tensors[:first], [given[kind][place] for kind, place in order], exclude)
        to_excluded = [tensor for group in result.to_excluded for tensor in group]
        return [tf.identity(tensor) for tensor in (*result.outputs, *result.states, *to_excluded)]

    model = convert(trace(step, [*specs, *state_specs, *excluded_specs]), network.model)
    return _plain(model, len(specs), len(network.outputs), len(state_specs), counts)


def trace(function: Callable[..., Any], specs: list[Any]) -> Any:
    """Traces a function of tensors with TensorFlow.

    Args:
        function: Takes and returns tensors.
        specs: The inputs' shapes and types.

    Returns:
        TensorFlow's concrete function, whose inputs are named in0, in1, ...
    """
    named = [tf.TensorSpec(spec.shape, spec.dtype, name=f"in{place}") for place, spec in enumerate(specs)]
    return tf.function(function, autograph=False).get_concrete_function(*named)


def convert(traced: Any, network: Any) -> onnx.ModelProto:
    """Converts a traced function with tf2onnx; the model's inputs and outputs are in the function's order.

    Args:
        traced: What `trace` returned.
        network: The Keras model behind the function; errors name its layers.

    Raises:
        ExportError: Something in it has no operator in ONNX.

    It is frozen here because tf2onnx's own `from_function` turns every constant tensor that a layer holds (the mean of
    a `Normalization`, say) into an input of the model.
    """
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL + 1)  # failures are reported below
    frozen = freeze(traced)
    graph = frozen.graph.as_graph_def(add_shapes=True)
    for node in graph.node:
        # tf2onnx takes bfloat16 for float16.
        if any(attribute.type == tf.bfloat16.as_datatype_enum for attribute in node.attr.values()):
            raise ExportError(
                f"{_layer_of(node, network)} casts to bfloat16, in which ONNX Runtime computes little on a CPU: "
                f"use float32 there"
            )
    try:
        model = convert_graph(
            graph,
            [tensor.name for tensor in frozen.inputs],
            [tensor.name for tensor in frozen.outputs],
            OPSET,
            HANDLERS,
            REWRITERS,
        )
    except Exception as error:
        raise ExportError(f"tf2onnx cannot convert the network: {first_line(error)}") from None
    for node in model.graph.node:
        if not onnx.defs.has(node.op_type, OPSET, node.domain):
            raise ExportError(
                f"{_layer_of(node, network)} uses TensorFlow's {node.op_type}, which tf2onnx cannot convert to "
                f"ONNX: write that layer or cell with other operations of keras.ops"
            )
    return model


def _layer_of(node: onnx.NodeProto, network: Any) -> str:
    """Names the layer that a node was traced from; TensorFlow names nodes after layers, with a number added."""
    layers = {layer.name: layer for layer in all_layers(network, include_self=False)}
    for part in node.name.split("/"):
        layer = layers.get(part) or layers.get(part.rpartition("_")[0])
        if layer is not None:
            return f"layer {layer.name!r} ({type(layer).__name__})"
    return repr(node.name)


def _plain(model: onnx.ModelProto, inputs: int, outputs: int, states: int, counts: list[int]) -> StepGraph:
    """Strips what tf2onnx leaves around a step: Identity nodes, and axes that are added and removed again."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    same: dict[str, str] = {}  # name -> the name of an equal tensor
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
        from_excluded=ins[inputs + states :],
        outputs=outs[:outputs],
        next_states=outs[outputs : outputs + states],
        to_excluded=[[next(into) for _ in range(count)] for count in counts],
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
    """Finds shapes and types by running the step at two batch sizes: shape inference loses the batch at a `Slice`."""
    names = [value.name for value in model.graph.input] + [name for node in nodes for name in node.output if name]
    everything = [onnx.ValueInfoProto(name=name) for node in nodes for name in node.output if name]
    graph = helper.make_graph(nodes, "step", list(model.graph.input), everything, list(constants.values()))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # ONNX Runtime sets this for the process by its first session. Proofs are of the service, which sets it.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    step = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    # A graph without nodes cannot be run: the whole step was excluded.
    try:
        session = ort.InferenceSession(step.SerializeToString(), options, ["CPUExecutionProvider"]) if nodes else None
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the network: {first_line(error)}") from None
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
