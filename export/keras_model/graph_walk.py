"""Walks a Keras model along its own graph, call by call, with another function in place of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import tree

from cellserve.export.errors import note_layer
from cellserve.export.keras_model.keras_private import calls, graph_of, has_graph, mask_of, set_mask

_VIEWS = ("Cast", "ExpandDims", "Identity", "Reshape", "Squeeze")  # operations that change no value of an integer


class Call(NamedTuple):
    """One call of a layer or an operation at its place in a model's graph."""

    operation: Any  # a layer, or an operation such as `a + b`
    symbolic: Any  # (args, kwargs) with the symbolic tensors of the time when the model was built
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Makes the call as Keras does."""
        return self.operation(*self.args, **self.kwargs)

    @property
    def takes_time(self) -> bool:
        """Whether the first input tensor still has a time axis."""
        return any(map(is_timed, tree.flatten(self.symbolic[0])[:1]))

    @property
    def mask(self) -> Any:
        """The mask `[batch, time]` of the input's time steps, or None."""
        mask = self.kwargs.get("mask")
        return mask if mask is not None else mask_of(tree.flatten((self.args, self.kwargs))[0])

    def with_mask(self, y: Any) -> Any:
        """Attaches to the layer's output the mask that the layer passes on; returns the output."""
        if self.mask is not None and self.operation.supports_masking:
            set_mask(y, self.operation.compute_mask(self.args[0], self.mask))
        return y

    def __str__(self) -> str:
        name = type(self.operation).__name__
        return f"layer {self.operation.name!r} ({name})"


def is_timed(tensor: Any) -> bool:
    """Whether a symbolic tensor has the time axis, whose size is left open."""
    return isinstance(tensor, keras.KerasTensor) and len(tensor.shape) > 1 and tensor.shape[1] is None


def walk(model: Any, inputs: Sequence[Any], visit: Callable[[Call], Any]) -> list[Any]:
    """Runs a model's graph, and the graphs of models within it, with `visit` in place of each layer's call.

    Keras's public `clone_model(call_function=...)` cannot change a tensor's rank on the way, which a step does.
    """
    graph = graph_of(model)
    values = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
    for node in calls(model):
        symbolic = _first_positional(node.operation, node.arguments.args, node.arguments.kwargs)
        args, kwargs = _first_positional(node.operation, *node.arguments.fill_in(values))
        if isinstance(node.operation, keras.Model) and has_graph(node.operation):
            masks = tree.flatten(kwargs.get("mask"))
            for tensor, mask in zip(tree.flatten(args), masks, strict=False):
                if mask is not None:
                    set_mask(tensor, mask)
            result: Any = walk(node.operation, tree.flatten(args), visit)
        else:
            call = Call(node.operation, symbolic, args, kwargs)
            try:
                result = visit(call)
            except Exception as error:
                note_layer(error, str(call))
                raise
        values.update(zip(map(id, node.outputs), tree.flatten(result), strict=True))
    return [values[id(tensor)] for tensor in graph.outputs]


def _first_positional(operation: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call with the first of them made positional: `layer(inputs=x)` becomes `layer(x)`."""
    name = next(iter(inspect.signature(operation.call).parameters), "")
    if args or name not in kwargs:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


class Reader(NamedTuple):
    """A layer or operation that reads a tensor."""

    operation: Any
    args: tuple[Any, ...]  # its symbolic arguments
    place: int  # the place of the tensor among them


def readers(model: Any, place: int) -> list[Reader]:
    """The layers that read a model's input, except the comparisons that Keras inserts for a mask."""
    return _readers(model, graph_of(model).inputs[place])


def _readers(model: Any, tensor: Any) -> list[Reader]:
    """The layers that read a tensor, also one that differs from it only in its shape or integer type."""
    found: list[Reader] = []
    for node in calls(model):
        for inner, argument in enumerate(tree.flatten(node.arguments.args)):
            if argument is not tensor:
                continue
            name = type(node.operation).__name__
            if isinstance(node.operation, keras.Model) and has_graph(node.operation):
                found += readers(node.operation, inner)
            elif name in _VIEWS and "int" in str(tensor.dtype) and "int" in str(node.outputs[0].dtype):
                found += _readers(model, node.outputs[0])
            elif name != "NotEqual":
                found.append(Reader(node.operation, node.arguments.args, inner))
    return found
