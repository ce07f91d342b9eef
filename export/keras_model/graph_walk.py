"""Walks a Keras model along its own graph, call by call, with something else in the place of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import tree

# The mask that travels with a tensor; Keras has no public name for it.
from keras.src.backend import get_keras_mask, set_keras_mask


class Call(NamedTuple):
    """One call of a layer or an operation, where it stands in a model's graph."""

    operation: Any  # a layer, or an operation such as `a + b`
    symbolic: Any  # (args, kwargs) with the tensors that Keras knew when the model was built
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        """Does what Keras does."""
        return self.operation(*self.args, **self.kwargs)

    @property
    def takes_time(self) -> bool:
        """Whether the first tensor that it takes has a time axis still."""
        return any(map(is_timed, tree.flatten(self.symbolic[0])[:1]))

    @property
    def mask(self) -> Any:
        """The mask `[batch, time]` of the time steps that it takes, or None."""
        mask = self.kwargs.get("mask")
        return mask if mask is not None else get_keras_mask(tree.flatten((self.args, self.kwargs))[0])

    def with_mask(self, y: Any) -> Any:
        """Gives the layer's output with the mask that the layer hands on."""
        if self.mask is not None and self.operation.supports_masking:
            set_keras_mask(y, self.operation.compute_mask(self.args[0], self.mask))
        return y

    def __str__(self) -> str:
        name = type(self.operation).__name__
        return f"layer {self.operation.name!r} ({name})"


def is_timed(tensor: Any) -> bool:
    """Says whether a tensor of a model's graph has the time axis, which is left open."""
    return isinstance(tensor, keras.KerasTensor) and len(tensor.shape) > 1 and tensor.shape[1] is None


def walk(model: Any, inputs: Sequence[Any], call: Callable[[Call], Any]) -> list[Any]:
    """Runs a model's graph, and the graphs of models within it, with `call` in the place of each layer's call.

    Keras's public `clone_model(call_function=...)` cannot change a tensor's rank on the way, which a step does.
    """
    graph = graph_of(model)
    values = {id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            symbolic = _first_in_place(node.operation, node.arguments.args, node.arguments.kwargs)
            args, kwargs = _first_in_place(node.operation, *node.arguments.fill_in(values))
            if isinstance(node.operation, keras.Model) and has_graph(node.operation):
                masks = tree.flatten(kwargs.get("mask"))
                for tensor, mask in zip(tree.flatten(args), masks, strict=False):
                    if mask is not None:
                        set_keras_mask(tensor, mask)
                result: Any = walk(node.operation, tree.flatten(args), call)
            else:
                result = call(Call(node.operation, symbolic, args, kwargs))
            values.update(zip(map(id, node.outputs), tree.flatten(result), strict=True))
    return [values[id(tensor)] for tensor in graph.outputs]


def _first_in_place(operation: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Gives the arguments of a call with the first of them in its place: `layer(inputs=x)` is `layer(x)`."""
    name = next(iter(inspect.signature(operation.call).parameters), "")
    if args or name not in kwargs:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def graph_of(model: Any) -> Any:
    """Gives the graph of a Sequential or functional model."""
    return getattr(model, "_functional", None) or model


def has_graph(model: Any) -> bool:
    """Says whether the model is Sequential or functional: a subclassed one hides its layers."""
    return hasattr(graph_of(model), "_nodes_by_depth")


def readers(model: Any, place: int) -> list[Any]:
    """Gives the layers that read a model's input, but for the comparisons that Keras writes for a mask."""
    graph, found = graph_of(model), []
    tensor = graph.inputs[place]
    for nodes in graph._nodes_by_depth.values():
        for node in nodes:
            for inner, given in enumerate(tree.flatten(node.arguments.args)):
                if given is not tensor:
                    continue
                if isinstance(node.operation, keras.Model) and has_graph(node.operation):
                    found += readers(node.operation, inner)
                elif type(node.operation).__name__ != "NotEqual":
                    found.append(node.operation)
    return found
