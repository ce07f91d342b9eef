"""The inputs and outputs of a Keras network as a model's signature has them: names, types, shapes, bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from cellserve.export.errors import ExportError
from cellserve.export.keras_model.graph_walk import graph_of, readers
from cellserve.export.keras_model.naming import Names
from cellserve.models.signature import TensorSpec

_DTYPES = ("float32", "int32", "int64")
_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


def input_specs(model: Any) -> tuple[TensorSpec, ...]:
    """Gives the inputs: one is called `x`, several keep their names.

    An input that only `Embedding` layers read holds integers, whatever Keras says of it; they give it its bounds. What
    `Masking`, or an `Embedding` with `mask_zero`, takes for a step to pass over is told too.

    Raises:
        ExportError: An input has no time axis that is left open, or a type that no request can carry.
    """
    specs = []
    names = _names(graph_of(model)._inputs_struct, model.inputs, "x")
    for place, (name, tensor) in enumerate(zip(names, model.inputs, strict=True)):
        shape = tuple(tensor.shape)
        if len(shape) < 2 or shape[1] is not None or None in shape[2:]:
            raise ExportError(
                f"the input {tensor.name!r} has shape {shape}, not [batch, time, *features] with the time left open: "
                f"declare it as keras.Input((None, features)); what does not change with time is sent at every step"
            )
        layers = [getattr(layer, "layer", layer) for layer in readers(model, place)]  # within a TimeDistributed
        embeddings = [layer for layer in layers if isinstance(layer, keras.layers.Embedding)]
        dtype, bounds, masked = _dtype(tensor), _RANGES.get(str(tensor.dtype)), None
        if embeddings and len(embeddings) == len(layers) and dtype == "float32":
            dtype = "int32"
        sizes = [size for layer in layers if (size := _classes(layer))]
        if dtype != "float32" and sizes:
            bounds = 0, min(sizes) - 1
        if any(layer.mask_zero for layer in embeddings):
            masked = 0.0
        for layer in layers:
            if isinstance(layer, keras.layers.Masking):
                masked = float(layer.mask_value)
        specs.append(TensorSpec(name=name, dtype=dtype, shape=shape[2:], bounds=bounds, masked=masked))
    return tuple(specs)


def output_specs(model: Any, values: Sequence[Any], inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Gives the outputs, of which `values` are one time step each: one is called `y`, several by their layers.

    Raises:
        ExportError: An output has a type that no answer can carry.
    """
    specs = []
    names = _names(graph_of(model)._outputs_struct, model.outputs, "y", [spec.name for spec in inputs])
    for name, value in zip(names, values, strict=True):
        dtype: Any = keras.backend.standardize_dtype(value.dtype)
        if dtype == model.layers[-1].compute_dtype:
            dtype = "float32"  # in float64 a network is run for comparison only
        if dtype not in _DTYPES:
            raise ExportError(
                f"the output {name!r} is of {dtype}, which is none of {', '.join(_DTYPES)}: cast it in the network"
            )
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(int(size) for size in value.shape[1:])))
    return tuple(specs)


def _names(structure: Any, tensors: list[Any], alone: str, taken: Sequence[str] = ()) -> list[str]:
    """Gives the names of ends: the keys of a dictionary, where the model has one, or those of layers; none twice."""
    keys = [alone] if len(tensors) == 1 else []
    if isinstance(structure, dict) and len(structure) == len(tensors) > 1:
        keys = sorted(structure)  # the order in which Keras flattens a dictionary
    operations = [_Key(key) for key in keys] or [tensor._keras_history.operation for tensor in tensors]
    names = Names(operations, taken)
    return [names.of(operation) for operation in operations]


class _Key(NamedTuple):
    """A name that is given, as a layer has one."""

    name: str


def _classes(layer: Any) -> int | None:
    """Gives the number of integers, from 0 on, that a layer or operation knows what to do with."""
    if isinstance(layer, keras.layers.Embedding):
        return int(layer.input_dim)
    if isinstance(layer, keras.layers.CategoryEncoding):
        return int(layer.num_tokens)
    return int(layer.num_classes) if type(layer).__name__ == "OneHot" else None


def _dtype(tensor: Any) -> Any:
    dtype = str(tensor.dtype)
    if dtype in _DTYPES:
        return dtype
    if dtype == "string":
        raise ExportError(f"the input {tensor.name!r} is of strings: export the network behind its lookup of strings")
    return "float32" if "float" in dtype else "int32"
