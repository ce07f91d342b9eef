"""Assembles the graph over whole sequences from the graph of one step.

The step's nodes and the feedback of next states into states make a directed graph. Its strongly connected parts are the
true recurrences: each becomes an ONNX `Scan` over time with just those nodes inside. A recurrence that was left out of
the trace becomes the operator that its lowering writes. Everything else (projections of the input, the layers before,
between and behind) depends on no state of its own time step and is hoisted out of the loops: it runs once over all time
steps at a time, `[time * batch, ...]`, just as the step would run it over a larger batch.
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
class LeftOut:
    """A recurrence that the trace goes around: what goes into it, and the operator that it becomes."""

    recurrence: Recurrence
    lowering: Lowering
    sources: list[str]  # its input, and its mask where it is masked
    states: list[str]


class Assembly:
    """The model of whole sequences in the making.

    Args:
        network: The network.
        step: Its step, traced around the recurrences that have a lowering.
        lowerings: For each recurrence of the network its lowering, or None where the step runs through it.
        signature: Gives the ends their names.
    """

    def __init__(
        self,
        network: StatefulNetwork,
        step: StepGraph,
        lowerings: Sequence[Lowering | None],
        signature: Signature,
    ) -> None:
        self.step, self.signature = step, signature
        self.main = GraphBuilder()
        self.main.initializers.update(step.constants)  # what the loops alone need is dropped at the end
        self.producers = {name: node for node in step.nodes for name in node.output}
        names = iter(signature.states)
        self.state_names: dict[str, str] = {}  # the step's input: the model's
        self.left_out: dict[str, LeftOut] = {}  # by its output
        places, left_places = iter(range(len(step.states))), iter(range(len(step.from_left_out)))
        for recurrence, lowering in zip(network.recurrences, lowerings, strict=True):
            given = [next(names).name for _ in recurrence.states]
            if lowering is None:
                self.state_names.update({step.states[next(places)]: name for name in given})
            else:
                place = next(left_places)
                self.left_out[step.from_left_out[place]] = LeftOut(
                    recurrence, lowering, step.into_left_out[place], given
                )
        self.following = dict(zip(step.states, step.next_states, strict=True))
        self.loops = self._loops()
        self.timed: dict[str, str] = {}  # the step's tensor: its name with axes [time, batch, ...]
        self.flat: dict[str, str] = {}  # the step's tensor: its name with axes [time * batch, ...]
        self.final: dict[str, str] = {}  # the model's state: its value after the last step
        self.sizes = ""  # the tensor [time, batch]
        self.lengths = signature.lengths or ""
        self.last = ""  # the tensor [batch] of each row's last valid step among [time * batch]

    def model(self) -> onnx.ModelProto:
        """Makes the model.

        Raises:
            ExportError: The step mixes rows of the batch, so that no part of it can be computed ahead.
        """
        for spec, tensor in zip(self.signature.inputs, self.step.inputs, strict=True):
            swapped = [1, 0, *range(2, 2 + len(spec.shape))]
            self.timed[tensor] = self.main.node("Transpose", spec.name, perm=swapped)
        self.sizes = self.main.node("Shape", self.timed[self.step.inputs[0]], start=0, end=2)
        return self._finished()

    def _finished(self) -> onnx.ModelProto:
        """Writes everything that the outputs need, and the outputs."""
        main = self.main
        self._emit_outputs()
        for cell_output in self.left_out:
            self._timed(cell_output)
        for state, name in self.state_names.items():
            self.final[name] = self._at_lengths(self.following[state])
        for state_spec in self.signature.states:
            main.nodes.append(helper.make_node("Identity", [self.final[state_spec.name]], [state_spec.next_name]))
        graph = self._with_ends()
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
        """Gives a tensor's value `[batch, ...]` at each row's last valid step."""
        main = self.main
        if not self.lengths:
            return str(main.node("Gather", self._timed(tensor), main.constant(np.array(-1)), axis=0))
        if not self.last:
            # The place of (length - 1, row) among [time * batch].
            before = main.node("Sub", main.node("Cast", self.lengths, to=TensorProto.INT64), main.constant(np.array(1)))
            batch = main.node("Squeeze", main.node("Shape", self.lengths))
            row = main.node("Range", main.constant(np.array(0)), batch, main.constant(np.array(1)))
            self.last = main.node("Add", main.node("Mul", before, batch), row)
        return str(main.node("Gather", self._flat(tensor), self.last, axis=0))

    # A tensor of the step, over time

    def _timed(self, tensor: str) -> str:
        """Gives the tensor's name with axes `[time, batch, ...]`, written on the first demand."""
        if tensor not in self.timed:
            if tensor in self.left_out:
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
        """Gives the tensor's name with axes `[time * batch, ...]`, written on the first demand."""
        if tensor in self.step.constants or tensor == "":
            return tensor
        if tensor not in self.flat:
            node = self.producers.get(tensor)
            if node is None or tensor in self.loops:
                shape = self.main.constant(np.array([-1, *self._row_shape(tensor)]))
                self.flat[tensor] = self.main.node("Reshape", self._timed(tensor), shape)
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
                f"one row for each row of the batch and fixed sizes otherwise; keep shapes of each step fixed"
            )
        return [int(size) for size in shape[1:]]

    # Recurrences

    def _loops(self) -> dict[str, _Loop]:
        """Finds the strongly connected parts with a state in them; gives for each tensor made in one its loop."""
        sources: dict[str, set[str]] = {state: {following} for state, following in self.following.items()}
        for node in self.step.nodes:
            for name in node.output:
                sources[name] = set(node.input)
        for output, left_out in self.left_out.items():
            sources[output] = set(left_out.sources)
        reach = {name: _reachable(name, sources) for name in sources}
        loops: dict[str, _Loop] = {}
        for state in self.step.states:
            if state not in loops:
                members = {name for name in reach[state] if state in reach.get(name, ())} | {state}
                loop = _Loop([name for name in self.step.states if name in members], members)
                loops.update(dict.fromkeys(members, loop))
        return loops

    def _emit_lowering(self, output: str) -> None:
        left = self.left_out[output]

        def run(x: str, lengths: str, states: Sequence[str]) -> tuple[str, list[str]]:
            return left.lowering(self.main, left.recurrence.cell, x, lengths, states)

        x, *mask = map(self._timed, left.sources)
        if mask:
            self.timed[output], final = self._emit_masked(left, run, x, *mask)
        else:
            self.timed[output], final = run(x, self.lengths, left.states)
        self.final.update(zip(left.states, final, strict=True))

    def _emit_masked(self, left: LeftOut, run: masking.Run, x: str, mask: str) -> tuple[str, list[str]]:
        return masking.over_time(self.main, left.recurrence, run, x, mask, self.lengths, left.states)

    def _emit_loop(self, loop: _Loop) -> None:
        """Writes a loop as a `Scan`: states carried, tensors from outside scanned, tensors needed outside collected."""
        step = self.step
        body = GraphBuilder(f"loop_{loop.states[0]}/")
        scanned: dict[str, None] = {}
        inside: dict[str, str] = {state: body.prefix + state for state in loop.states}
        constants: dict[str, None] = {}

        def demand(name: str) -> str:
            """Gives a tensor's name inside the body: made there, scanned, or a constant."""
            if name == "":
                return name
            if name not in inside:
                inside[name] = body.prefix + name
                node = self.producers.get(name)
                if name in step.constants:
                    constants[name] = None
                elif node is None or (name not in loop.members and step.has_rows(name)):
                    scanned[name] = None
                elif name not in loop.members and name in self.loops:
                    raise ExportError(f"the tensor {name!r} of one recurrence feeds another without a row a batch row")
                else:
                    # A member, or what has no rows to scan (the batch's size, say): it is computed inside.
                    copy = onnx.NodeProto()
                    copy.CopyFrom(node)
                    copy.name = body.prefix + node.name
                    copy.input[:] = [demand(source) for source in node.input]
                    copy.output[:] = [body.prefix + output for output in node.output]
                    inside.update({output: body.prefix + output for output in node.output})
                    body.nodes.append(copy)
            return inside[name]

        carried = [demand(self.following[state]) for state in loop.states]
        wanted = [name for name in sorted(loop.members) if name in self._needed_outside(loop)]
        collected = [demand(name) for name in wanted]
        if not scanned:  # a count of the steps, say: the loop must know how many there are
            demand(step.inputs[0])
        for name in constants:
            tensor = onnx.TensorProto.FromString(step.constants[name].SerializeToString())
            tensor.name = inside[name]
            body.initializers[tensor.name] = tensor

        made = {name for node in body.nodes for name in node.output}
        outputs = []
        following = [self.following[state] for state in loop.states]
        for name, end in zip((*following, *wanted), (*carried, *collected), strict=True):
            if end in made:
                made.remove(end)
            else:
                # One tensor cannot be two outputs (ONNX Runtime then mixes them up), nor an input an output.
                end = body.node("Identity", end)
            outputs.append(self._value_info(name, end))
        inputs = [self._value_info(name, inside[name]) for name in (*loop.states, *scanned)]
        results = self.main.node(
            "Scan",
            *(self.state_names[state] for state in loop.states),
            *(self._timed(name) for name in scanned),
            outputs=len(outputs),
            body=body.graph(f"loop_{loop.states[0]}", inputs, outputs),
            num_scan_inputs=len(scanned),
        )
        for name, result in zip(wanted, results[len(loop.states) :], strict=True):
            self.timed[name] = result

    def _needed_outside(self, loop: _Loop) -> set[str]:
        step = self.step
        outside = {name for node in step.nodes if not loop.members.intersection(node.output) for name in node.input}
        into_left_out = [name for names in step.into_left_out for name in names]
        return outside | {*step.outputs, *step.next_states, *into_left_out}

    # The ends

    def _value_info(self, tensor: str, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.step.types[tensor], self.step.shapes.get(tensor))

    def _with_ends(self) -> onnx.GraphProto:
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
    """A recurrence: the states that it carries, and every tensor of the step that is made within it."""

    def __init__(self, states: list[str], members: set[str]) -> None:
        self.states, self.members = states, members


def _reachable(start: str, sources: dict[str, set[str]]) -> set[str]:
    """Gives all tensors that `start` is computed from, over the feedback of the states too."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in sources.get(waiting.pop(), ()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found
