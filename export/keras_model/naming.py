"""Stable names of states, inputs and outputs, after their layers.

Keras numbers the layers that it names by what else the process has built: one network's `lstm` is another's `lstm_5`.
Here they are numbered by their order in the network, so that the states of one version fit the next.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from cellserve.export.keras_model.keras_private import calls, default_name, has_graph, producer


class UniqueNames:
    """Names layers and operations, once for each call of them.

    Args:
        operations: All operations that may be named; names chosen by users are reserved for their operations.
        taken: Names that are in use already.
    """

    def __init__(self, operations: Iterable[Any], taken: Iterable[str] = ()) -> None:
        self._chosen_by_users = {operation.name for operation in operations if not _is_automatic(operation)}
        self._taken = set(taken)

    def assign(self, operation: Any) -> str:
        """Returns an unused name: `lstm`, then `lstm_2`; a name chosen by the user is used first as it is."""
        chosen = not _is_automatic(operation)
        base = operation.name if chosen else default_name(operation)
        for count in itertools.count(1):
            name = base if count == 1 else f"{base}_{count}"
            if name not in self._taken and (name not in self._chosen_by_users or (chosen and name == base)):
                break
        self._taken.add(name)
        return str(name)


def number_layers(model: Any) -> None:
    """Renames the layers that Keras named by their order in the network, so that reports and errors have one name each.

    They are then called as their states are.
    """
    layers = list(_operations(model))
    names = UniqueNames(layers)
    for layer in dict.fromkeys(layers):
        layer.name = names.assign(layer)


def _operations(model: Any) -> Iterator[Any]:
    """Yields the layers and operations of a model, and of models within it, at each of their calls."""
    if not has_graph(model):
        return
    yield from map(producer, model.inputs)
    for node in calls(model):
        yield node.operation
        if isinstance(node.operation, keras.Model):
            yield from _operations(node.operation)


def _is_automatic(operation: Any) -> bool:
    """Whether Keras made the name: the class's in snake case, with a number from the second on."""
    return re.fullmatch(rf"{re.escape(default_name(operation))}(_\d+)?", operation.name) is not None
