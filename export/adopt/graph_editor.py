"""An ONNX graph that was made elsewhere: reads it, checks it, and edits it into one that can be served."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from cellserve.export.adopt.state_matching import Dims, Port
from cellserve.export.errors import ExportError
from cellserve.models.signature import METADATA_KEY, ModelDocument

# Of which ONNX Runtime has the operators itself; no library of custom ones is ever loaded.
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_LARGEST_BYTES = 2**31 - 1  # of a protocol buffer
_AXES_AS_INPUT = 13  # the opset from which Squeeze and Unsqueeze take their axes as an input
# What an index passes unchanged on its way to a Gather.
_PASSING = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


class ForeignGraph:
    """The graph of an ONNX file, being edited.

    Args:
        path: The file.

    Raises:
        ExportError: It is no ONNX file, needs custom operators or a later ONNX, or has data outside its folder.
    """

    def __init__(self, path: Path) -> None:
        self.model = _load(path)
        self.opset = next((told.version for told in self.model.opset_import if told.domain in ("", "ai.onnx")), 0)
        _check_operators(self.model, self.opset)
        if any(entry.key == METADATA_KEY for entry in self.model.metadata_props):
            raise ExportError(f"{path} is a model of cellserve's already: copy its folder into the repository")
        self.original: bytes = self.model.SerializeToString()
        graph = self.graph = self.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        self._defaults = [port for port in graph.input if port.name in constants]
        for port in self._defaults:  # a weight, which old files list among the inputs too, or a default
            graph.input.remove(port)
        del graph.value_info[:]  # it tells of shapes that may change here
        self._front: list[Any] = []

    @property
    def inputs(self) -> list[Port]:
        """The inputs that are left."""
        return [_port(port) for port in self.graph.input]

    @property
    def defaults(self) -> list[Port]:
        """What could be an input and has a value in the file."""
        return [_port(port) for port in self._defaults]

    def free(self, name: str) -> None:
        """Makes an input of what has a default, which must be zeros: what states begin with."""
        tensor = next(tensor for tensor in self.graph.initializer if tensor.name == name)
        if numpy_helper.to_array(tensor).any():
            raise ExportError(
                f"state {name} begins with numbers of its own, and sessions begin with zeros: "
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
        """How often each operator stands in the graph, and in the graphs within it."""
        counts: dict[str, int] = {}
        for node in _nodes(self.graph.node):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def bake(self, name: str, text: str) -> np.ndarray:
        """Makes an input a constant; gives its value.

        Args:
            name: Of the input.
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

    def fix(self, sizes: Mapping[str, int]) -> None:
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
        """Puts the last entries of an input's last axis before those of the next step; gives the state's two names."""
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

    def turn_input(self, name: str, order: Sequence[int]) -> None:
        """Lets an input come in another order of axes: `order` gives for each of its own axes the one it comes as."""
        self._rename(name, f"{name}.turned")
        self._front.insert(0, helper.make_node("Transpose", [name], [f"{name}.turned"], perm=list(order)))

    def turn_output(self, name: str, order: Sequence[int]) -> None:
        """Lets an output leave in another order of axes."""
        self._rename(name, f"{name}.turned")
        self.graph.node.append(helper.make_node("Transpose", [f"{name}.turned"], [name], perm=list(order)))

    def add_batch_axis(self, name: str, is_input: bool) -> None:
        """Gives an input or output that has no batch axis a first one of size one."""
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
        """Gives the bounds of an integer input that is only ever the index into a constant; None where it is not."""
        constants = {tensor.name: list(tensor.dims) for tensor in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = list(node.attribute[0].t.dims)
        names, sizes = {name}, set()
        for node in _nodes(self.graph.node):
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

    def finished(self, shapes: Mapping[str, Dims], document: ModelDocument | None = None) -> bytes:
        """Gives the file, its inputs and outputs of these shapes, with the document about it."""
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
        """Renames a tensor wherever nodes take or give it; the graph's input or output keeps its name."""
        for node in _nodes([*self.graph.node, *self._front]):
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name == old:
                        names[place] = new
        for graph in _subgraphs(self.graph.node):
            for port in graph.output:
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
    for tensor in external_data_helper._get_all_tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (home / location).resolve()
        if not file.is_relative_to(home) or not file.is_file():
            raise ExportError(
                f"{path}: the data of {tensor.name!r} is to be in {location!r}, no file of its own folder"
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
    nodes = list(_nodes(model.graph.node)) + [node for function in model.functions for node in _nodes(function.node)]
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
        raise ExportError(f"its opset is {opset}, known here are those up to {known}: export it with an older one")


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


def _nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    """Gives nodes and those of the graphs within them."""
    for node in nodes:
        yield node
        for graph in _graphs(node):
            yield from _nodes(graph.node)


def _subgraphs(nodes: Iterable[Any]) -> Iterator[Any]:
    for node in _nodes(nodes):
        yield from _graphs(node)


def _graphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _listed(ports: Sequence[Port]) -> str:
    return ", ".join(f"{port.name} {_words(port.dims)}" for port in ports)


def _words(dims: Dims | None) -> str:
    return "[?]" if dims is None else f"[{', '.join(map(str, dims))}]"
