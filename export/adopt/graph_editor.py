"""An ONNX graph that was made elsewhere: reads it, checks it, and edits it so that it can be served."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from cellserve.export.adopt.onnx_private import all_tensors
from cellserve.export.adopt.state_matching import Dims, Port
from cellserve.export.errors import ExportError
from cellserve.export.onnx_graph.builder import all_nodes, count_operators, subgraphs
from cellserve.models.signature import METADATA_KEY, ModelDocument

# Domains whose operators ONNX Runtime has built in; no library of custom operators is ever loaded.
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_LARGEST_BYTES = 2**31 - 1  # limit of a protocol buffer
_AXES_AS_INPUT = 13  # the opset from which Squeeze and Unsqueeze take their axes as an input
# Operators that leave the values of an index unchanged on its way to a Gather.
_PASSING = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


class ForeignGraph:
    """The graph of an ONNX file, open for edits.

    Args:
        path: The file.

    Raises:
        ExportError: It is not an ONNX file, needs custom operators or a later ONNX, or has data outside its folder.
    """

    def __init__(self, path: Path) -> None:
        self.model = _load(path)
        self.opset = next((told.version for told in self.model.opset_import if told.domain in ("", "ai.onnx")), 0)
        _check_operators(self.model, self.opset)
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
        """Replaces an input by a constant; returns its value.

        Args:
            name: The input's name.
            text: The value in JSON: a number, true or false, or nested lists of them.
        """
        port = next((port for port in self.graph.input if port.name == name), None)
        if port is None:
            raise ExportError(f"--constant {name}: the graph has no such input, it has {_listed(self.inputs)}")
        told = _port(port)
        try:
            value = np.asarray(json.loads(text))
            if value.dtype.kind not in "iufb":
                raise ValueError("not numbers")
            given = value.astype(told.type)
            if (given != value).any() and given.dtype.kind != "f":
                raise ValueError(f"not of type {told.type}")
            dims = told.dims or ()
            sizes = tuple(dim for dim in dims if isinstance(dim, int))
            if len(sizes) == len(dims):
                given = np.broadcast_to(given, sizes)
            elif given.ndim != len(dims):
                raise ValueError(f"its shape is {list(given.shape)}, the input's {_words(dims)}")
        except ValueError as error:
            raise ExportError(f"--constant {name}={text}: {error}: give a number, or nested lists in JSON") from None
        self.graph.input.remove(port)
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(given).reshape(given.shape), name))
        return given

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

    def keep_context(self, name: str, size: int) -> tuple[str, str]:
        """Prepends an input's last entries to those of its next step, as a state; returns the state's two names."""
        whole, state, following = f"{name}.whole", f"{name}.context", f"{name}.context.next"
        self._rename(name, whole)
        self._front.insert(0, helper.make_node("Concat", [state, name], [whole], axis=-1))
        bounds = [self._constant(f"{state}.{what}", [value]) for what, value in (("from", -size), ("to", 2**62))]
        axes = self._constant(f"{state}.axis", [-1])
        self.graph.node.append(helper.make_node("Slice", [whole, *bounds, axes], [following]))
        like = next(port for port in self.graph.input if port.name == name)
        for ports, port_name in ((self.graph.input, state), (self.graph.output, following)):
            port = ports.add()
            port.CopyFrom(like)
            port.name = port_name
        return state, following

    def transpose_input(self, name: str, order: Sequence[int]) -> None:
        """Accepts an input with permuted axes: `order` is the incoming axis for each of the graph's own."""
        self._rename(name, f"{name}.turned")
        self._front.insert(0, helper.make_node("Transpose", [name], [f"{name}.turned"], perm=list(order)))

    def transpose_output(self, name: str, order: Sequence[int]) -> None:
        """Returns an output with permuted axes."""
        self._rename(name, f"{name}.turned")
        self.graph.node.append(helper.make_node("Transpose", [f"{name}.turned"], [name], perm=list(order)))

    def add_batch_axis(self, name: str, is_input: bool) -> None:
        """Adds a leading batch axis of size one to an input or output without one."""
        self._rename(name, f"{name}.alone")
        operator, given, made = ("Squeeze", name, f"{name}.alone") if is_input else ("Unsqueeze", f"{name}.alone", name)
        if self.opset >= _AXES_AS_INPUT:
            node = helper.make_node(operator, [given, self._constant(f"{name}.axes", [0])], [made])
        else:
            node = helper.make_node(operator, [given], [made], axes=[0])
        if is_input:
            self._front.insert(0, node)
        else:
            self.graph.node.append(node)

    def bounds(self, name: str) -> tuple[int, int] | None:
        """Bounds of an integer input that is only used as an index into constants; None for any other."""
        constants = {tensor.name: list(tensor.dims) for tensor in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = list(node.attribute[0].t.dims)
        names, sizes = {name}, set()
        for node in all_nodes(self.graph.node):
            if not names & set(node.input):
                continue
            if node.op_type in _PASSING and node.input[0] in names:
                names.add(node.output[0])
            elif node.op_type == "Gather" and node.input[1] in names and node.input[0] in constants:
                axis = next((told.i for told in node.attribute if told.name == "axis"), 0)
                sizes.add(constants[node.input[0]][axis])
            elif node.op_type != "Shape":
                return None
        return (0, min(sizes) - 1) if sizes else None

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


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path}: not an ONNX file ({type(error).__name__})") from None
    if not model.graph.node:
        raise ExportError(f"{path}: not an ONNX file, or one without a single node")
    home = path.resolve().parent
    for tensor in all_tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (home / location).resolve()
        if not file.is_relative_to(home) or not file.is_file():
            raise ExportError(
                f"{path}: the data of {tensor.name!r} is in {location!r}, which is not a file in the model's folder"
            )
    try:
        external_data_helper.load_external_data_for_model(model, str(home))
    except Exception as error:
        raise ExportError(f"{path}: its external data cannot be read: {str(error).splitlines()[0]}") from None
    if model.ByteSize() > _LARGEST_BYTES:
        raise ExportError(f"{path}: with its external data it has {model.ByteSize()} bytes, one file holds 2 GiB")
    return model


def _check_operators(model: Any, opset: int) -> None:
    own = {(function.domain, function.name) for function in model.functions}
    nodes = list(all_nodes(model.graph.node))
    for function in model.functions:
        nodes += all_nodes(function.node)
    custom = {
        f"{node.domain}::{node.op_type}"
        for node in nodes
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own
    }
    if custom:
        raise ExportError(
            f"it needs custom operators, which are not loaded: {', '.join(sorted(custom))}: export it without them"
        )
    known = onnx.defs.onnx_opset_version()
    if opset > known:
        raise ExportError(
            f"its opset is {opset}, but only opsets up to {known} are supported: export it with an older one"
        )


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


def _listed(ports: Sequence[Port]) -> str:
    return ", ".join(f"{port.name} {_words(port.dims)}" for port in ports)


def _words(dims: Dims | None) -> str:
    return "[?]" if dims is None else f"[{', '.join(map(str, dims))}]"
