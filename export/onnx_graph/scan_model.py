"""Assembles the graph over whole sequences from the graph of one step.

The step's nodes and the feedback of next states into states form a directed graph. Its strongly connected components
are the true recurrences: each becomes an ONNX `Scan` over time with just those nodes inside. A recurrence excluded from
the trace becomes the operator that its lowering writes. Everything else (projections of the input, the layers before,
between and after) depends on no state of its own time step and is hoisted out of the loops: it runs once over all time
steps, `[time * batch, ...]`, just as the step would run it over a larger batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from cellserve.export.errors import ExportError
from cellserve.export.keras_model.recurrences import Recurrence
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph import masking
from cellserve.export.onnx_graph.builder import GraphBuilder
from cellserve.export.onnx_graph.operators import Lowering
from cellserve.export.onnx_graph.tf_trace import BATCH, OPSET, StepGraph
from cellserve.models.signature import Signature

IR_VERSION = 10


@dataclass(frozen=True, slots=True)
class ExcludedRecurrence:
    """A recurrence outside the traced step, and the lowering that writes it as an operator."""

    recurrence: Recurrence
    lowering: Lowering
    sources: list[str]  # its input, and its mask if it is masked
    states: list[str]


class ScanModelBuilder:
    """Builds the model over whole sequences.

    Args:
        network: The network.
        step: Its step, traced around the recurrences that have a lowering.
        lowerings: The lowering of each recurrence, or None if the step includes it.
        signature: The model's signature.
    """

    def __init__(
        self,
        network: StatefulNetwork,
        step: StepGraph,
        lowerings: Sequence[Lowering | None],
        signature: Signature,
    ) -> None:
        self.step, self.signature = step, signature
        # Without lengths it is a part of a network of whole sequences, which has no states.
        self.main = GraphBuilder(returns_states=signature.lengths is not None)
        self.main.initializers.update(step.constants)  # those that only loops need are dropped at the end
        self.producers = {name: node for node in step.nodes for name in node.output}
        names = iter(signature.states)
        self.state_names: dict[str, str] = {}  # the step's state input -> the model's state
        self.excluded: dict[str, ExcludedRecurrence] = {}  # by the name of its output
        places, excluded_places = iter(range(len(step.states))), iter(range(len(step.from_excluded)))
        for recurrence, lowering in zip(network.recurrences, lowerings, strict=True):
            given = [next(names).name for _ in recurrence.states]
            if lowering is None:
                self.state_names.update({step.states[next(places)]: name for name in given})
            else:
                place = next(excluded_places)
                self.excluded[step.from_excluded[place]] = ExcludedRecurrence(
                    recurrence, lowering, step.to_excluded[place], given
                )
        self.following = dict(zip(step.states, step.next_states, strict=True))
        self.loops = self._loops()
        self.timed: dict[str, str] = {}  # the step's tensor -> its name with axes [time, batch, ...]
        self.flat: dict[str, str] = {}  # the step's tensor -> its name with axes [time * batch, ...]
        self.final: dict[str, str] = {}  # the model's state -> the tensor of its value after the last step
        self.sizes = ""  # name of the tensor with the sizes [time, batch]
        self.lengths = signature.lengths or ""
        self.last = ""  # name of the tensor [batch] with the index of each row's last valid step in [time * batch]

    def model(self) -> onnx.ModelProto:
        """Returns the model.

        Raises:
            ExportError: The step mixes rows of the batch, so that no part of it can be computed ahead.
        """
        for spec, tensor in zip(self.signature.inputs, self.step.inputs, strict=True):
            swapped = [1, 0, *range(2, 2 + len(spec.shape))]
            self.timed[tensor] = self.main.node("Transpose", spec.name, perm=swapped)
        self.sizes = self.main.node("Shape", self.timed[self.step.inputs[0]], start=0, end=2)
        return self._finished()

    def _finished(self) -> onnx.ModelProto:
        """Writes the outputs and everything that they need; returns the checked model."""
        main = self.main
        self._emit_outputs()
        for cell_output in self.excluded:
            self._timed(cell_output)
        for state, name in self.state_names.items():
            self.final[name] = self._at_lengths(self.following[state])
        for state_spec in self.signature.states:
            main.nodes.append(helper.make_node("Identity", [self.final[state_spec.name]], [state_spec.next_name]))
        graph = self._with_inputs_and_outputs()
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="cellserve"
        )
        onnx.checker.check_model(model)
        return model

    def _emit_outputs(self) -> None:
        for spec, tensor in zip(self.signature.outputs, self.step.outputs, strict=True):
            order = [1, 0, *range(2, 2 + len(spec.shape))]
            self.main.nodes.append(helper.make_node("Transpose", [self._timed(tensor)], [spec.name], perm=order))

    def _at_lengths(self, tensor: str) -> str:
        """A tensor's value `[batch, ...]` at each row's last valid step."""
        main = self.main
        if not self.lengths:
            return str(main.node("Gather", self._timed(tensor), main.constant(np.array(-1)), axis=0))
        if not self.last:
            # Index of (length - 1, row) in [time * batch].
            before = main.node("Sub", main.node("Cast", self.lengths, to=TensorProto.INT64), main.constant(np.array(1)))
            batch = main.node("Squeeze", main.node("Shape", self.lengths))
            row = main.node("Range", main.constant(np.array(0)), batch, main.constant(np.array(1)))
            self.last = main.node("Add", main.node("Mul", before, batch), row)
        return str(main.node("Gather", self._flat(tensor), self.last, axis=0))

    # Tensors of the step, over time

    def _timed(self, tensor: str) -> str:
        """The tensor's name with axes `[time, batch, ...]`; its nodes are written at the first use."""
        if tensor not in self.timed:
            if tensor in self.excluded:
                self._emit_lowering(tensor)
            elif tensor in self.loops:
                self._emit_loop(self.loops[tensor])
            else:
                shape = self.main.node(
                    "Concat", self.sizes, self.main.constant(np.array(self._row_shape(tensor), np.int64)), axis=0
                )
                self.timed[tensor] = self.main.node("Reshape", self._flat(tensor), shape)
        return self.timed[tensor]

    def _flat(self, tensor: str) -> str:
        """The tensor's name with axes `[time * batch, ...]`; its nodes are written at the first use."""
        if tensor in self.step.constants or tensor == "":
            return tensor
        if tensor not in self.flat:
            node = self.producers.get(tensor)
            if node is None or tensor in self.loops:
                shape = self.main.constant(np.array([-1, *self._row_shape(tensor)]))
                self.flat[tensor] = self.main.node("Reshape", self._timed(tensor), shape)
            elif self.takes_sizes(node):
                self.flat[tensor] = self.sizes_of(node, self.main, self._flat(self.step.inputs[0]))
            else:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.input[:] = [self._flat(name) for name in node.input]
                self.main.nodes.append(copy)
                self.flat.update({name: name for name in node.output})
        return self.flat[tensor]

    def _row_shape(self, tensor: str) -> list[int]:
        shape = self.step.shapes.get(tensor)
        if shape is None or not self.step.has_rows(tensor) or not all(isinstance(size, int) for size in shape[1:]):
            raise ExportError(
                f"the tensor {tensor!r} of the step has shape {shape}: outside the recurrence every tensor must have "
                f"one row per row of the batch and otherwise fixed sizes; keep the shapes of each step fixed"
            )
        return [int(size) for size in shape[1:]]

    def takes_sizes(self, node: onnx.NodeProto) -> bool:
        """Whether a node returns the sizes of a tensor with rows: they depend on the batch, and on no value."""
        sizes = self.step.shapes.get(node.input[0], ()) if node.op_type == "Shape" and not node.attribute else ()
        return sizes[:1] == (BATCH,) and all(isinstance(size, int) for size in sizes[1:])

    def sizes_of(self, node: onnx.NodeProto, graph: GraphBuilder, rows: str) -> str:
        """Writes such a node to a graph in which a tensor `rows` has as many rows; returns its output's name."""
        sizes = graph.constant(np.array(self.step.shapes[node.input[0]][1:], np.int64))
        return str(graph.node("Concat", graph.node("Shape", rows, start=0, end=1), sizes, axis=0))

    # Recurrences

    def _loops(self) -> dict[str, _Loop]:
        """Finds the strongly connected components that contain a state; maps each of their tensors to its loop."""
        sources: dict[str, set[str]] = {state: {following} for state, following in self.following.items()}
        for node in self.step.nodes:
            for name in node.output:
                sources[name] = set() if self.takes_sizes(node) else set(node.input)
        for output, excluded in self.excluded.items():
            sources[output] = set(excluded.sources)
        reach = {name: _reachable(name, sources) for name in sources}
        loops: dict[str, _Loop] = {}
        for state in self.step.states:
            if state not in loops:
                members = {name for name in reach[state] if state in reach.get(name, ())} | {state}
                loop = _Loop([name for name in self.step.states if name in members], members)
                loops.update(dict.fromkeys(members, loop))
        return loops

    def _emit_lowering(self, output: str) -> None:
        excluded = self.excluded[output]

        def run(x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
            return excluded.lowering(self.main, excluded.recurrence.cell, x, lengths, states)

        x, *mask = map(self._timed, excluded.sources)
        if mask:
            self.timed[output], final = self._emit_masked(excluded, run, x, *mask)
        else:
            self.timed[output], final = run(x, self.lengths, excluded.states)
        self.final.update(zip(excluded.states, final, strict=True))

    def _emit_masked(self, excluded: ExcludedRecurrence, run: masking.Run, x: str, mask: str) -> tuple[str, list[str]]:
        inputs = masking.Masked(x, mask, excluded.states, self.lengths)
        return masking.over_time(self.main, excluded.recurrence, run, inputs)

    def _emit_loop(self, loop: _Loop) -> None:
        """Writes a loop as a `Scan`: carries states, scans tensors from outside, collects tensors needed outside."""
        body = _LoopBody(self, loop)
        following = [self.following[state] for state in loop.states]
        collected = sorted(loop.members & self._needed_outside(loop))
        ends = [body.require(name) for name in (*following, *collected)]
        if not body.scanned:  # the loop needs the number of steps, even if it only counts them
            body.require(self.step.inputs[0])
        ends = body.distinct(ends)
        outputs = [self._value_info(name, end) for name, end in zip((*following, *collected), ends, strict=True)]
        inputs = [self._value_info(name, body.names[name]) for name in (*loop.states, *body.scanned)]
        results = self.main.node(
            "Scan",
            *(self.state_names[state] for state in loop.states),
            *(self._timed(name) for name in body.scanned),
            outputs=len(outputs),
            body=body.builder.graph(f"loop_{loop.states[0]}", inputs, outputs),
            num_scan_inputs=len(body.scanned),
        )
        for name, result in zip(collected, results[len(loop.states) :], strict=True):
            self.timed[name] = result

    def _needed_outside(self, loop: _Loop) -> set[str]:
        step = self.step
        outside = {name for node in step.nodes if not loop.members.intersection(node.output) for name in node.input}
        to_excluded = [name for names in step.to_excluded for name in names]
        return outside | {*step.outputs, *step.next_states, *to_excluded}

    # Inputs and outputs

    def _value_info(self, tensor: str, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.step.types[tensor], self.step.shapes.get(tensor))

    def _with_inputs_and_outputs(self) -> onnx.GraphProto:
        signature = self.signature

        def info(name: str, dtype: str, *shape: int | str) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

        inputs = [info(spec.name, spec.dtype, BATCH, "time", *spec.shape) for spec in signature.inputs]
        if self.lengths:
            inputs.append(info(self.lengths, "int32", BATCH))
        inputs += [info(spec.name, spec.dtype, BATCH, *spec.shape) for spec in signature.states]
        outputs = [info(spec.name, spec.dtype, BATCH, "time", *spec.shape) for spec in signature.outputs]
        outputs += [info(spec.next_name, spec.dtype, BATCH, *spec.shape) for spec in signature.states]
        used = {name for node in self.main.nodes for name in node.input}
        self.main.initializers = {name: tensor for name, tensor in self.main.initializers.items() if name in used}
        return self.main.graph("cellserve", inputs, outputs)


class _Loop:
    """A recurrence: its states, and every tensor of the step that is computed within it."""

    def __init__(self, states: list[str], members: set[str]) -> None:
        self.states, self.members = states, members


class _LoopBody:
    """The body of a loop in the making: nodes are added as their tensors are required."""

    def __init__(self, model: ScanModelBuilder, loop: _Loop) -> None:
        self.model, self.loop = model, loop
        self.builder = GraphBuilder(f"loop_{loop.states[0]}/")
        self.scanned: dict[str, None] = {}  # tensors from outside, one slice per time step
        self.names = {state: self.builder.prefix + state for state in loop.states}  # the step's tensor -> its name here

    def require(self, name: str) -> str:
        """Returns a tensor's name in the body, where it is computed, scanned, or a constant."""
        if name == "" or name in self.names:
            return self.names.get(name, "")
        step, prefix = self.model.step, self.builder.prefix
        inside = self.names[name] = prefix + name
        node = self.model.producers.get(name)
        if name in step.constants:
            tensor = onnx.TensorProto.FromString(step.constants[name].SerializeToString())
            tensor.name = inside
            self.builder.initializers[inside] = tensor
        elif node is None or (name not in self.loop.members and step.has_rows(name)):
            self.scanned[name] = None
        elif self.model.takes_sizes(node):
            self.names[name] = self.model.sizes_of(node, self.builder, self.names[self.loop.states[0]])
            return self.names[name]
        elif name not in self.loop.members and name in self.model.loops:
            raise ExportError(f"the tensor {name!r} of one recurrence feeds another, but has no row per batch row")
        else:
            # A member, or a tensor without rows to scan, such as the batch size: it is computed inside.
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = prefix + node.name
            copy.input[:] = [self.require(source) for source in node.input]
            copy.output[:] = [prefix + output for output in node.output]
            self.names.update({output: prefix + output for output in node.output})
            self.builder.nodes.append(copy)
        return inside

    def distinct(self, ends: Sequence[str]) -> list[str]:
        """Makes names fit as outputs: ONNX Runtime mixes up a tensor that is two outputs, or an input and an output."""
        computed = {name for node in self.builder.nodes for name in node.output}
        outputs = []
        for end in ends:
            if end in computed:
                computed.remove(end)
                outputs.append(end)
            else:
                outputs.append(self.builder.node("Identity", end))
        return outputs


def _reachable(start: str, sources: dict[str, set[str]]) -> set[str]:
    """All tensors that `start` is computed from, including by way of the states' feedback."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in sources.get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found
