"""Networks that read whole sequences only: backwards, or with layers that mix time steps.

Such a network cannot be stepped, but each of its recurrent layers could. Each becomes a small network of its own, built
like any other and embedded in the graph of the remaining layers, which tf2onnx converts. A layer that reads backwards
gets its input reversed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import onnx
import tensorflow as tf
from keras import ops
from onnx import helper, numpy_helper

from cellserve.export.errors import ExportError, first_line
from cellserve.export.keras_model.graph_walk import Call, is_timed, walk
from cellserve.export.keras_model.keras_private import set_mask, takes_mask
from cellserve.export.keras_model.load import with_open_shapes
from cellserve.export.keras_model.recurrences import Recurrence
from cellserve.export.keras_model.step_network import StatefulNetwork, refuse_foreign_states
from cellserve.export.keras_model.tensor_specs import input_specs, output_specs
from cellserve.export.onnx_graph.builder import add_prefix, all_nodes
from cellserve.export.onnx_graph.tf_trace import BATCH, convert, trace
from cellserve.models.signature import Signature, TensorSpec

_TIMES = (16, 128, 1024)  # numbers of time steps to try
Recur = Callable[[Any, Any, Any], Any]  # (recurrent layer, its sequence, its mask) -> y [batch, time, *shape]
Build = Callable[[StatefulNetwork, Signature], onnx.ModelProto]


@dataclass(frozen=True, slots=True)
class _Part:
    """A recurrent layer as a network of its own, with input x, and a mask of 0 and 1 if it is masked."""

    network: StatefulNetwork
    masked: bool


class SequenceNetwork:
    """A Keras network that runs over whole sequences, starting from zeros.

    Args:
        model: A Sequential or functional Keras model; every input is `[batch, time, *features]`.
        reason: Why it cannot be stepped.

    Raises:
        ExportError: The network cannot be exported.
    """

    def __init__(self, model: Any, reason: str) -> None:
        self.original, self.model, self.reason = model, with_open_shapes(model), reason
        self.inputs: tuple[TensorSpec, ...] = input_specs(self.model)
        self.timed = [is_timed(tensor) for tensor in self.model.outputs]  # outputs that have the time axis
        self.parts: list[_Part] = []
        self._at = ""  # last called layer, for errors
        self.outputs: tuple[TensorSpec, ...] = self._discover()
        self.min_steps = self._shortest()

    @property
    def recurrences(self) -> list[Recurrence]:
        """The cells of all recurrent layers."""
        return [recurrence for part in self.parts for recurrence in part.network.recurrences]

    @property
    def signature(self) -> Signature:
        """The exported model's signature; all sequences of a run have one length."""
        return Signature(
            inputs=self.inputs,
            outputs=self.outputs,
            states=(),
            lengths=None,
            predict_only=self.reason,
            min_steps=self.min_steps,
            default_output="all" if any(self.timed) else "last",
        )

    def run(self, inputs: Sequence[Any], states: Sequence[Any] = ()) -> tuple[list[Any], list[Any]]:
        """Runs Keras over whole sequences `[batch, time, *features]`; returns the outputs, and no states."""
        return walk(self.model, inputs, lambda call: call()), []

    def assemble(self, build: Build) -> onnx.ModelProto:
        """Returns the ONNX model.

        Args:
            build: Builds the model over whole sequences of one recurrent layer's network.
        """
        specs = [tf.TensorSpec([None, None, *spec.shape], spec.dtype) for spec in self.inputs]
        specs += [tf.TensorSpec([None, None, *part.network.outputs[0].shape], "float32") for part in self.parts]
        count = len(self.inputs)

        def rest(*tensors: Any) -> list[Any]:
            given, into = iter(tensors[count:]), []

            def recur(layer: Any, sequence: Any, mask: Any) -> Any:
                into.extend([sequence] if mask is None else [sequence, ops.cast(mask, "int32")])
                y = next(given)
                y.set_shape([*sequence.shape[:2], *y.shape[2:]])  # layers after a RepeatVector rely on its number
                return y

            outputs = self._walk(tensors[:count], recur)
            if any(self.timed):  # outputs are returned together: if one has the time axis, all get it
                outputs = [
                    y if timed else _at_every_step(y, ops.shape(tensors[0])[1])
                    for y, timed in zip(outputs, self.timed, strict=True)
                ]
            return [tf.identity(tensor) for tensor in (*outputs, *into)]

        return self._joined(convert(trace(rest, specs), self.model), build)

    def _discover(self) -> tuple[TensorSpec, ...]:
        def recur(layer: Any, sequence: Any, mask: Any) -> Any:
            part = _Part(_alone(layer, tuple(sequence.shape[2:]), mask is not None), mask is not None)
            self.parts.append(part)
            given = [sequence] if mask is None else [sequence, ops.cast(mask, "int32")]
            states = [ops.zeros((sequence.shape[0], *state.shape), state.dtype) for state in part.network.states]
            return part.network.run(given, states)[0][0]

        for time in _TIMES:
            self.parts = []
            try:
                outputs = self._walk([ops.zeros((2, time, *spec.shape), spec.dtype) for spec in self.inputs], recur)
                break
            except (ValueError, tf.errors.OpError) as error:  # too short for a convolution
                failure = first_line(error)
            except ExportError:
                fixed = self.original.inputs[0].shape[1]
                if fixed is None or time == fixed:
                    raise
                raise ExportError(
                    f"the network cannot be stepped ({self.reason}), and {self._at} works for {fixed} time steps and "
                    f"no other number: leave out what makes features of time steps"
                ) from None
        else:
            raise ExportError(
                f"the network cannot be stepped ({self.reason}), nor run over {', '.join(map(str, _TIMES))} time steps "
                f"({self._at} fails: {failure}): leave out layers that need a certain number, such as Flatten"
            )
        if not self.parts:
            raise ExportError(
                "the network has no recurrent layer (keras.layers.RNN over a cell): there is no state to serve"
            )
        if len(outputs) > 1 and any(timed and y.shape[1] != time for y, timed in zip(outputs, self.timed, strict=True)):
            raise ExportError(
                "several outputs must all have as many time steps as the inputs: export a model for each output"
            )
        return output_specs(
            self.model, [y[:, 0] if timed else y for y, timed in zip(outputs, self.timed, strict=True)], self.inputs
        )

    def _shortest(self) -> int:
        """Finds the smallest number of time steps that Keras accepts, by bisection."""
        if self._runs_over(1):
            return 1
        fails, runs = 1, next(time for time in _TIMES if self._runs_over(time))
        while runs - fails > 1:
            middle = (runs + fails) // 2
            if self._runs_over(middle):
                runs = middle
            else:
                fails = middle
        return runs

    def _runs_over(self, time: int) -> bool:
        try:
            outputs, _ = self.run([ops.zeros((1, time, *spec.shape), spec.dtype) for spec in self.inputs])
        except (ValueError, tf.errors.OpError):
            return False
        return all(0 not in y.shape for y in outputs)

    def _walk(self, inputs: Sequence[Any], recur: Recur) -> list[Any]:
        def one_way(layer: Any, sequence: Any, mask: Any) -> Any:
            if layer.go_backwards:
                sequence, mask = ops.flip(sequence, 1), None if mask is None else ops.flip(mask, 1)
            y = recur(layer, sequence, mask)
            return y if layer.return_sequences else y[:, -1]

        def visit(call: Call) -> Any:
            self._at, layer = str(call), call.operation
            if isinstance(layer, keras.layers.RNN):
                refuse_foreign_states(call)
                y = one_way(layer, call.args[0], call.mask)
            elif type(layer) is keras.layers.Bidirectional:
                refuse_foreign_states(call)
                forward, backward = layer.forward_layer, layer.backward_layer
                y = _merged(layer, *(one_way(way, call.args[0], call.mask) for way in (forward, backward)))
            elif type(layer) is keras.layers.TimeDistributed and not takes_mask(layer.layer):
                return _distributed(call)
            else:
                return call()
            if call.mask is not None and layer.return_sequences:
                for each in y if isinstance(y, list) else [y]:
                    set_mask(each, call.mask)
            return y

        return walk(self.model, inputs, visit)

    def _joined(self, rest: onnx.ModelProto, build: Build) -> onnx.ModelProto:
        """Embeds the graphs of the recurrent layers in the graph of the rest."""
        taken = [value.name for value in rest.graph.input]
        given = [value.name for value in rest.graph.output]
        nodes, constants = list(rest.graph.node), list(rest.graph.initializer)

        def same(source: str, name: str) -> None:
            nodes.append(helper.make_node("Identity", [source], [name]))

        into = iter(given[len(self.outputs) :])
        for place, part in enumerate(self.parts):
            signature = part.network.signature.model_copy(update={"lengths": None})
            model = build(part.network, signature)
            add_prefix(model.graph, f"recurrent{place}/")
            nodes += model.graph.node
            constants += model.graph.initializer
            sequence = next(into)
            inputs = [value.name for value in model.graph.input]
            same(sequence, inputs[0])
            if part.masked:
                same(next(into), inputs[1])
            for state, name in zip(part.network.states, inputs[1 + part.masked :], strict=True):
                made = _zeros(f"{name}/zeros", sequence, state.shape, np.dtype(state.dtype))
                constants += made[1]
                nodes += made[0]
                same(f"{name}/zeros", name)
            same(model.graph.output[0].name, taken[len(self.inputs) + place])
        for spec, name in zip(self.inputs, taken, strict=False):
            same(spec.name, name)
        for spec, name in zip(self.outputs, given, strict=False):
            same(name, spec.name)
        nodes = _sorted(nodes, [spec.name for spec in self.outputs])
        used = {name for node in nodes for name in _sources(node)}
        steps = ["steps"] if any(self.timed) else []
        graph = helper.make_graph(
            nodes,
            "cellserve",
            [_info(spec, (BATCH, "time", *spec.shape)) for spec in self.inputs],
            [_info(spec, (BATCH, *steps, *spec.shape)) for spec in self.outputs],
            [constant for constant in constants if constant.name in used],
        )
        model = helper.make_model(graph, opset_imports=rest.opset_import, ir_version=10, producer_name="cellserve")
        onnx.checker.check_model(model)
        return model


def _alone(layer: Any, features: tuple[int, ...], masked: bool) -> StatefulNetwork:
    """A network of one recurrent layer, forwards, that returns its output at every step."""
    x = keras.Input((None, *features), name="x")
    mask = keras.Input((None,), dtype="int32", name="mask")
    # A copy of the layer, as `keras.layers.RNN` does not know the shapes of a convolution's states.
    config = {**layer.get_config(), "go_backwards": False, "return_sequences": True}
    try:
        loop = type(layer).from_config(config)
        loop.cell = layer.cell
        y = loop(x, mask=ops.cast(mask, "bool")) if masked else loop(x)
    except Exception as error:
        raise ExportError(
            f"layer {layer.name!r} ({type(layer).__name__}) cannot be rebuilt from its config ({first_line(error)}): "
            f"a layer of your own needs a get_config that returns its constructor's arguments"
        ) from None
    return StatefulNetwork(keras.Model([x, mask] if masked else x, y))


def _distributed(call: Call) -> Any:
    """Calls a `TimeDistributed` layer's own layer on all time steps as one batch.

    Keras maps it over time where the batch size is not known, which tf2onnx converts into a graph that fails.
    """
    x = call.args[0]
    y = call.operation.layer(ops.reshape(x, (-1, *x.shape[2:])))
    return call.with_mask(ops.reshape(y, (-1, ops.shape(x)[1], *y.shape[1:])))


def _merged(layer: Any, y: Any, reverse: Any) -> Any:
    """Merges the outputs of the two directions of `Bidirectional`."""
    if layer.return_sequences:
        reverse = ops.flip(reverse, axis=1)
    merges: dict[str | None, Callable[[], Any]] = {
        "concat": lambda: ops.concatenate([y, reverse], axis=-1),
        "sum": lambda: y + reverse,
        "ave": lambda: (y + reverse) / 2,
        "mul": lambda: y * reverse,
        None: lambda: [y, reverse],
    }
    return merges[layer.merge_mode]()


def _at_every_step(y: Any, time: Any) -> Any:
    """Repeats `[batch, *shape]` at every time step."""
    return ops.broadcast_to(ops.expand_dims(y, 1), (ops.shape(y)[0], time, *y.shape[1:]))


def _zeros(
    name: str, like: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants that compute zeros `[batch, *shape]` with the batch size of another tensor."""
    sizes = numpy_helper.from_array(np.array(shape, np.int64), f"{name}/sizes")
    value = numpy_helper.from_array(np.zeros(1, dtype))
    nodes = [
        helper.make_node("Shape", [like], [f"{name}/batch"], start=0, end=1),
        helper.make_node("Concat", [f"{name}/batch", sizes.name], [f"{name}/shape"], axis=0),
        helper.make_node("ConstantOfShape", [f"{name}/shape"], [name], value=value),
    ]
    return nodes, [sizes]


def _sorted(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, each after those that it reads from."""
    producers = {name: node for node in nodes for name in node.output if name}
    ordered: dict[int, onnx.NodeProto] = {}
    waiting = [producers[name] for name in reversed(outputs)]
    while waiting:
        node = waiting[-1]
        missing = [
            producers[name] for name in _sources(node) if name in producers and id(producers[name]) not in ordered
        ]
        if missing:
            waiting += missing
        else:
            ordered.setdefault(id(node), node)
            waiting.pop()
    return list(ordered.values())


def _sources(node: onnx.NodeProto) -> set[str]:
    """Names of the tensors that a node reads, in graphs within it too."""
    return {name for each in all_nodes([node]) for name in each.input}


def _info(spec: TensorSpec, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), shape)
