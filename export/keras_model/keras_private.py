"""The private parts of Keras that the export uses, all in one place; tried with Keras 3.15.

Keras has no public way to walk a model's graph, to read the mask that travels with a tensor, or to name a layer after
its class. `tests/export/test_private_parts.py` names what is missing after an upgrade.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keras.src import backend
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.utils.naming import to_snake_case


def mask_of(tensor: Any) -> Any:
    """The mask that travels with a tensor, or None."""
    return get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask to a tensor."""
    set_keras_mask(tensor, mask)


@contextmanager
def casts_to_double() -> Iterator[None]:
    """Makes `keras.ops.cast` give float64 where float32 is asked for."""
    cast = backend.core.cast

    def in_double(x: Any, dtype: Any) -> Any:
        return cast(x, "float64" if backend.standardize_dtype(dtype) == "float32" else dtype)

    backend.core.cast = in_double
    try:
        yield
    finally:
        backend.core.cast = cast


def default_name(operation: Any) -> str:
    """The name that Keras derives from the class of a layer or operation, before it adds a number."""
    return str(to_snake_case(type(operation).__name__))


def graph_of(model: Any) -> Any:
    """The graph of a Sequential or functional model: it has `inputs` and `outputs`."""
    return getattr(model, "_functional", None) or model


def has_graph(model: Any) -> bool:
    """Whether the model is Sequential or functional: a subclassed model hides its layers."""
    return hasattr(graph_of(model), "_nodes_by_depth")


def calls(model: Any) -> Iterator[Any]:
    """Yields the calls of layers and operations in a model's graph, each after the calls that it reads from.

    Each has `operation`, `arguments` (with `args`, `kwargs`, `fill_in`) and `outputs`.
    """
    by_depth = graph_of(model)._nodes_by_depth
    for depth in sorted(by_depth, reverse=True):
        yield from (node for node in by_depth[depth] if not node.is_input)


def all_layers(model: Any, include_self: bool = True) -> list[Any]:
    """All layers of a model, including those of models and layers within it."""
    return list(model._flatten_layers(include_self=include_self))


def input_structure(model: Any) -> Any:
    """The inputs of a model as it was built: a tensor, or a list or dictionary of them."""
    return graph_of(model)._inputs_struct


def output_structure(model: Any) -> Any:
    """The outputs of a model as it was built: a tensor, or a list or dictionary of them."""
    return graph_of(model)._outputs_struct


def producer(tensor: Any) -> Any:
    """The layer or operation that a symbolic tensor comes from."""
    return tensor._keras_history.operation


def takes_mask(layer: Any) -> bool:
    """Whether a layer's `call` has a `mask` argument."""
    return bool(layer._call_has_mask_arg)
