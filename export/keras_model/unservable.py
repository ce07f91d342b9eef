"""Refuses networks whose structure no session can have, with how to change them.

These checks look at Keras's graph alone, before anything is called, so that the reason is not hidden behind the first
layer that happens to fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras import tree

from cellserve.export.errors import ExportError
from cellserve.export.keras_model.graph_walk import readers
from cellserve.export.keras_model.keras_private import all_layers, calls, has_graph

_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional)


def refuse_unservable(model: Any) -> None:
    """Refuses a network without recurrent layers, without a time axis, or with states of its own as inputs.

    Raises:
        ExportError: The network is one of these.
    """
    if not isinstance(model, keras.Model) or not has_graph(model) or not model.inputs:
        return  # a subclassed model, which is refused elsewhere
    if not any(isinstance(layer, keras.layers.RNN) for layer in all_layers(model)):
        raise ExportError(
            "the network has no recurrent layer (keras.layers.RNN over a cell): there is no state to serve"
        )
    _refuse_given_states(model)
    _refuse_vectors(model)


def _refuse_vectors(model: Any) -> None:
    """Refuses an input `[batch, features]`: the features would be taken for time steps."""
    for place, tensor in enumerate(model.inputs):
        if len(tensor.shape) != 2 or tensor.shape[1] is None or "float" not in str(tensor.dtype):
            continue
        size = tensor.shape[1]
        for layer in (reader.operation for reader in readers(model, place)):
            if isinstance(layer, keras.layers.Reshape | keras.layers.RepeatVector):
                raise ExportError(
                    f"the input {tensor.name!r} has no time axis, {_named(layer)} makes time steps of its {size} "
                    f"numbers: declare it as keras.Input((None, features)) with the features of one time step, and "
                    f"leave that layer out"
                )
            if getattr(layer, "weights", None) and not isinstance(layer, keras.layers.Embedding):
                raise ExportError(
                    f"the input {tensor.name!r} has no time axis, {_named(layer)} takes its {size} numbers as "
                    f"features: declare it as keras.Input((None, {size})), and send them at every time step"
                )


def _refuse_given_states(model: Any) -> None:
    """Refuses a recurrent layer that starts from an input, or from the states of another layer."""
    nodes = list(calls(model))
    makers = {id(tensor): node for node in nodes for tensor in node.outputs}
    inputs = {id(tensor): tensor for tensor in model.inputs}
    for node in nodes:
        layer = node.operation
        if isinstance(layer, keras.Model) and has_graph(layer):
            _refuse_given_states(layer)
        if not isinstance(layer, _RECURRENT):
            continue
        for tensor in _initial_states(node):
            for source in _sources(tensor, makers):
                if isinstance(source, _RECURRENT):
                    raise ExportError(
                        f"{_named(layer)} starts from the states of {_named(source)}: export the two as networks of "
                        f"their own, an encoder and a decoder, without return_state and initial_state; the service "
                        f"returns the states of the one and starts the other from them (see docs/explanation/export.md)"
                    )
                if id(source) in inputs:
                    raise ExportError(
                        f"{_named(layer)} starts from the input {source.name!r} (initial_state): leave that input "
                        f"out, and return_state; sessions carry the states, and a request may send the first ones"
                    )


def _initial_states(node: Any) -> list[Any]:
    args, kwargs = node.arguments.args, node.arguments.kwargs
    given = kwargs.get("initial_state", args[1] if len(args) > 1 else None)
    return [value for value in tree.flatten(given) if isinstance(value, keras.KerasTensor)]


def _sources(tensor: Any, makers: dict[int, Any]) -> Iterator[Any]:
    """Yields the recurrent layers that a tensor is computed from without another in between, and the inputs."""
    node = makers.get(id(tensor))
    if node is None:
        yield tensor
    elif isinstance(node.operation, _RECURRENT):
        yield node.operation
    else:
        for argument in tree.flatten((node.arguments.args, node.arguments.kwargs)):
            if isinstance(argument, keras.KerasTensor):
                yield from _sources(argument, makers)


def _named(layer: Any) -> str:
    return f"layer {layer.name!r} ({type(layer).__name__})"
