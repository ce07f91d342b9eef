"""The layers of a network, for the report's drawing and for the model file."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import keras
from keras import tree

from cellserve.export.keras_model.keras_private import calls, graph_of, has_graph
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.models.signature import Layer


def layers_of(network: StatefulNetwork | SequenceNetwork) -> tuple[Layer, ...]:
    """Returns a network's layers in the order of their calls, between its inputs and its outputs."""
    signature = network.signature
    states: dict[str, list[str]] = defaultdict(list)
    if isinstance(network, StatefulNetwork):
        for recurrence in network.recurrences:
            sizes = (f"{state.name} {list(state.shape)}" for state in recurrence.states)
            states[recurrence.layer] += [text for text in sizes if text not in states[recurrence.layer]]
    layers = [Layer(name=spec.name, label=f"input {list(spec.shape)}", kind="input") for spec in signature.inputs]
    ends = _add_layers(network.model, list(range(len(layers))), layers, states)
    for spec, end in zip(signature.outputs, ends, strict=True):
        layers.append(Layer(name=spec.name, label=f"output {list(spec.shape)}", kind="output", sources=(end,)))
    return tuple(layers)


def _add_layers(model: Any, inputs: list[int], layers: list[Layer], states: dict[str, list[str]]) -> list[int]:
    """Adds the layers of a model and of models within it; returns the places that its outputs come from."""
    graph = graph_of(model)
    places = {id(tensor): place for tensor, place in zip(graph.inputs, inputs, strict=True)}
    for node in calls(model):
        layer = node.operation
        inner = [t for t in tree.flatten((node.arguments.args, node.arguments.kwargs)) if id(t) in places]
        sources = list(dict.fromkeys(places[id(tensor)] for tensor in inner))
        if isinstance(layer, keras.Model) and has_graph(layer):
            results = _add_layers(layer, [places[id(tensor)] for tensor in inner], layers, states)
        else:
            carried = tuple(states.get(layer.name, ()))
            shape = list(tree.flatten(node.outputs)[0].shape[1:])
            label = f"{_type(layer)} {str(shape).replace('None', 'time')}"
            kind: Literal["recurrent", "layer"] = "recurrent" if carried else "layer"
            layers.append(Layer(name=layer.name, label=label, kind=kind, sources=tuple(sources), states=carried))
            results = [len(layers) - 1] * len(node.outputs)
        places.update(zip(map(id, node.outputs), results, strict=True))
    return [places[id(tensor)] for tensor in graph.outputs]


def _type(layer: Any) -> str:
    cell = getattr(layer, "cell", None)
    own = type(layer).__name__
    return f"{own}({type(cell).__name__})" if own == "RNN" and cell is not None else own
