"""An ONNX graph that was made elsewhere, edited so that it can be served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cellserve.export.adopt.graph_file import check_operators, load_foreign
from cellserve.export.adopt.state_matching import Dims, Port
from cellserve.export.adopt.tensor_roles import Axes, StateRole, listed, served_type, words
from cellserve.export.errors import ExportError
from cellserve.export.onnx_graph.builder import all_nodes, count_operators, subgraphs
from cellserve.models.signature import METADATA_KEY, ModelDocument

# The opsets from which Squeeze and Unsqueeze take their axes, and Slice its bounds, as inputs; that of Expand.
_AXES_AS_INPUT, _SLICE_BY_INPUTS, _EXPAND = 13, 10, 8
_END = 2**62  # beyond any tensor's end


class ForeignGraph:
    """The graph of an ONNX file, open for edits.

    Args:
        path: The file.

    Raises:
        ExportError: It is not an ONNX file, needs custom operators or a later ONNX, or has data outside its folder.
    """

    def __init__(self, path: Path) -> None:
        self.model = load_foreign(path)
        self.opset = next((told.version for told in self.model.opset_import if told.domain in ("", "ai.onnx")), 0)
        check_operators(self.model, self.opset)
        if any(entry.key == METADATA_KEY for entry in self.model.metadata_props):
            raise ExportError(f"{path} is already a model of cellserve: copy its folder into the repository")
        self.original: bytes = self.model.SerializeToString()
        graph = self.graph = self.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        self._defaults = [port for port in graph.input if port.name in constants]
        for port in self._defaults:  # weights, which old files also list as inputs, and defaults
            graph.input.remove(port)
        del graph.value_info[:]  # its shapes may change here
        self._front: list[Any] = []
        self.frozen: dict[str, str] = {}  # inputs that were replaced by constants, with their values as given

    @property
    def inputs(self) -> list[Port]:
        """The remaining inputs."""
        return [_port(port) for port in self.graph.input]

    @property
    def defaults(self) -> list[Port]:
        """Initializers that could be overridden as inputs."""
        return [_port(port) for port in self._defaults]

    def promote_default_to_input(self, name: str) -> None:
        """Turns an initializer into an input; its default must be zeros, as states begin with zeros."""
        tensor = next(tensor for tensor in self.graph.initializer if tensor.name == name)
        if numpy_helper.to_array(tensor).any():
            raise ExportError(
                f"state {name} begins with values other than zero, and sessions begin with zeros: "
                f"export it without them, and create sessions with these states"
            )
        self.graph.initializer.remove(tensor)
        self.graph.input.append(next(port for port in self._defaults if port.name == name))

    @property
    def outputs(self) -> list[Port]:
        """The outputs."""
        return [_port(port) for port in self.graph.output]

    @property
    def operators(self) -> dict[str, int]:
        """How often each operator is in the graph, and in the graphs within it."""
        return count_operators(self.graph)

    def freeze_input(self, name: str, text: str) -> np.ndarray:
        """Replaces an input by a constant; returns its value for one row.

        Args:
            name: The input's name.
            text: The value in JSON: a number, true or false, or nested lists of them. A number fills a shape; in a
                dimension that other inputs have too (the batch) there are as many entries as they have.
        """
        port = next((port for port in self.graph.input if port.name == name), None)
        if port is None:
            raise ExportError(f"--constant {name}: the graph has no such input, it has {listed(self.inputs)}")
        told = _port(port)
        try:
            value = np.asarray(json.loads(text))
            if value.dtype.kind not in "iufb":
                raise ValueError("not numbers")
            given = value.astype(told.type)
            if (given != value).any() and given.dtype.kind != "f":
                raise ValueError(f"not of type {told.type}")
            dims = told.dims or ()
            if not _fits(given.shape, dims):
                raise ValueError(f"its shape is {list(given.shape)}, the input's {words(dims)}")
            if all(isinstance(dim, int) for dim in dims) or not given.ndim:
                given = np.broadcast_to(given, [dim if isinstance(dim, int) else 1 for dim in dims])
        except ValueError as error:
            raise ExportError(f"--constant {name}={text}: {error}: give a number, or nested lists in JSON") from None
        self.graph.input.remove(port)
        self.frozen[name] = text
        given = np.ascontiguousarray(given).reshape(given.shape)
        sources = {axis: source for axis, dim in enumerate(dims) if (source := self._source(dim)) is not None}
        if value.ndim or not sources or self.opset < _EXPAND:
            self.graph.initializer.append(numpy_helper.from_array(given, name))
        else:
            self.graph.initializer.append(numpy_helper.from_array(given, f"{name}.one"))
            self._expand(name, given.shape, sources)
        return given

    def _source(self, dim: int | str) -> tuple[str, int] | None:
        """The input, and its axis, that has a dynamic dimension."""
        for port in self.inputs:
            if isinstance(dim, str) and dim in (port.dims or ()):
                return port.name, (port.dims or ()).index(dim)
        return None

    def _expand(self, name: str, shape: tuple[int, ...], sources: Mapping[int, tuple[str, int]]) -> None:
        """Repeats `NAME.one` along the axes whose sizes other inputs have."""
        sizes = []
        for axis, size in enumerate(shape):
            if axis not in sources:
                sizes.append(self._constant(f"{name}.size{axis}", [size]))
                continue
            source, place = sources[axis]
            index = self._constant(f"{name}.place{axis}", [place])
            self._front.append(helper.make_node("Shape", [source], [f"{name}.shape{axis}"]))
            sizes.append(f"{name}.size{axis}")
            self._front.append(helper.make_node("Gather", [f"{name}.shape{axis}", index], [sizes[-1]], axis=0))
        self._front.append(helper.make_node("Concat", sizes, [f"{name}.sizes"], axis=0))
        self._front.append(helper.make_node("Expand", [f"{name}.one", f"{name}.sizes"], [name]))

    def fix_dimensions(self, sizes: Mapping[str, int]) -> None:
        """Fixes dynamic dimensions by their names."""
        left = set(sizes)
        for port in [*self.graph.input, *self.graph.output]:
            for dim, name in zip(port.type.tensor_type.shape.dim, _port(port).dims or (), strict=False):
                if name in sizes:
                    dim.dim_value = sizes[str(name)]
                    left.discard(str(name))
        if left:
            known = {dim for port in self.inputs for dim in port.dims or () if isinstance(dim, str)}
            raise ExportError(f"--dim {sorted(left)[0]}: the inputs have no such dimension, they have {sorted(known)}")

    def keep_context(self, port: Port, axis: int, entries: int) -> tuple[Port, str]:
        """Prepends an input's last entries to those of its next step, as a state; returns the state and its next name.

        Args:
            port: The input.
            axis: The axis along which the entries lie.
            entries: How many of them.
        """
        name, dims = port.name, port.dims or ()
        whole, state, following = f"{name}.whole", f"{name}.context", f"{name}.context.next"
        self._rename(name, whole)
        self._front.insert(0, helper.make_node("Concat", [state, name], [whole], axis=axis))
        if self.opset >= _SLICE_BY_INPUTS:
            bounds = [self._constant(f"{state}.{what}", [value]) for what, value in (("from", -entries), ("to", _END))]
            sliced = helper.make_node("Slice", [whole, *bounds, self._constant(f"{state}.axis", [axis])], [following])
        else:
            sliced = helper.make_node("Slice", [whole], [following], axes=[axis], starts=[-entries], ends=[_END])
        self.graph.node.append(sliced)
        like = next(port for port in self.graph.input if port.name == name)
        for ports, port_name in ((self.graph.input, state), (self.graph.output, following)):
            added = ports.add()
            added.CopyFrom(like)
            added.name = port_name
        return Port(state, port.type, (*dims[:axis], entries, *dims[axis + 1 :])), following

    def serve_input(self, name: str, axes: Axes, rank: int, dtype: str) -> None:
        """Accepts an input as the service gives it: `[batch, time, ...]`, in the service's type.

        Args:
            name: The input's name.
            axes: The special axes among the graph's own.
            rank: How many axes the graph's own input has.
            dtype: Its type in the graph.
        """
        if axes.single is not None:
            self._axis_of_one(name, axes.single, True, add=True)
        seen = [axis for axis in range(rank) if axis != axes.single]
        incoming = [axis for axis in (axes.batch, axes.time) if axis is not None]
        incoming += [axis for axis in seen if axis not in incoming]
        if incoming != seen:
            self._edit(name, True, "turned", "Transpose", perm=[incoming.index(axis) for axis in seen])
        if axes.batch is None:
            self._axis_of_one(name, 0, True, add=False)
        self._cast(name, True, dtype)

    def serve_output(self, name: str, axes: Axes, rank: int, dtype: str) -> None:
        """Returns an output as the service wants it; the arguments are those of `serve_input`."""
        if axes.single is not None:
            self._axis_of_one(name, axes.single, False, add=False)
        seen = [axis for axis in range(rank) if axis != axes.single]
        wanted = [axis for axis in (axes.batch, axes.time) if axis is not None]
        wanted += [axis for axis in seen if axis not in wanted]
        if wanted != seen:
            self._edit(name, False, "turned", "Transpose", perm=[seen.index(axis) for axis in wanted])
        if axes.batch is None:
            self._axis_of_one(name, 0, False, add=True)
        self._cast(name, False, dtype)

    def serve_state(self, role: StateRole) -> None:
        """Takes and returns a state with a batch axis, in the service's type."""
        for name, is_input in ((role.port.name, True), (role.following, False)):
            if role.batch_axis is None:
                self._axis_of_one(name, 0, is_input, add=not is_input)
            self._cast(name, is_input, role.port.type)

    def _axis_of_one(self, name: str, axis: int, is_input: bool, add: bool) -> None:
        """Adds an axis of size one to an input or output, or removes it."""
        operator, suffix = ("Unsqueeze", "added") if add else ("Squeeze", "removed")
        if self.opset >= _AXES_AS_INPUT:
            constant = self._constant(f"{name}.{suffix}.axis", [axis])
            self._edit(name, is_input, suffix, operator, constant)
        else:
            self._edit(name, is_input, suffix, operator, axes=[axis])

    def _cast(self, name: str, is_input: bool, dtype: str) -> None:
        served = served_type(dtype)
        if served == dtype:
            return
        element = {kind: helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for kind in (served, dtype)}
        self._edit(name, is_input, "cast", "Cast", to=element[dtype if is_input else served])
        for port in self.graph.input if is_input else self.graph.output:
            if port.name == name:
                port.type.tensor_type.elem_type = element[served]

    def _edit(self, name: str, is_input: bool, suffix: str, operator: str, *constants: str, **attributes: Any) -> None:
        """Puts an operator behind an input or before an output, which keeps its name."""
        inner = f"{name}.{suffix}"
        self._rename(name, inner)
        if is_input:
            self._front.insert(0, helper.make_node(operator, [name, *constants], [inner], **attributes))
        else:
            self.graph.node.append(helper.make_node(operator, [inner, *constants], [name], **attributes))

    def answer_with(self, following: str) -> str:
        """Adds an output that equals a next state; returns its name."""
        name = f"{following}.output"
        self.graph.node.append(helper.make_node("Identity", [following], [name]))
        like = next(port for port in self.graph.output if port.name == following)
        added = self.graph.output.add()
        added.CopyFrom(like)
        added.name = name
        return name

    def drop_output(self, name: str) -> None:
        """Removes an output that nobody asked for."""
        self.graph.output.remove(next(port for port in self.graph.output if port.name == name))

    def to_bytes(self, shapes: Mapping[str, Dims], document: ModelDocument | None = None) -> bytes:
        """Returns the model file, with these shapes of inputs and outputs, and with the model document."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        nodes = [*self._front, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        for port in [*model.graph.input, *model.graph.output]:
            if port.name in shapes:
                port.CopyFrom(
                    helper.make_tensor_value_info(port.name, port.type.tensor_type.elem_type, shapes[port.name])
                )
            else:
                port.type.tensor_type.ClearField("shape")
        if document is not None:
            model.metadata_props.add(key=METADATA_KEY, value=document.model_dump_json())
        content: bytes = model.SerializeToString()
        return content

    def _constant(self, name: str, values: list[int]) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _rename(self, old: str, new: str) -> None:
        """Renames a tensor in all nodes; the graph's own input or output keeps its name."""
        for node in all_nodes([*self.graph.node, *self._front]):
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == old:
                        names[place] = new
        for node in all_nodes(self.graph.node):
            for port in (port for graph in subgraphs(node) for port in graph.output):
                if port.name == old:
                    port.name = new
        for tensor in self.graph.initializer:
            if tensor.name == old:
                tensor.name = new


def _fits(shape: tuple[int, ...], dims: Dims) -> bool:
    """Whether a constant can fill an input; only a number, or one of as many axes, if a size is dynamic."""
    if not shape:
        return True
    if len(shape) > len(dims) or (len(shape) < len(dims) and any(isinstance(dim, str) for dim in dims)):
        return False
    pairs = zip(shape[::-1], dims[::-1], strict=False)
    return all(isinstance(dim, str) or size in (1, dim) for size, dim in pairs)


def _port(told: Any) -> Port:
    tensor = told.type.tensor_type
    if not tensor.elem_type:
        raise ExportError(f"{told.name} is not a tensor: only tensors can be served")
    dims: Dims | None = None
    if tensor.HasField("shape"):
        dims = tuple(
            dim.dim_value if dim.dim_value > 0 else dim.dim_param or f"{told.name}.{axis}"
            for axis, dim in enumerate(tensor.shape.dim)
        )
    return Port(told.name, str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), dims)
