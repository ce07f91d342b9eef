"""Signature entries of a Keras network's inputs and outputs: names, types, shapes, bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from cellserve.export.errors import ExportError
from cellserve.export.keras_model.graph_walk import Reader, readers
from cellserve.export.keras_model.keras_private import input_structure, output_structure, producer
from cellserve.export.keras_model.naming import UniqueNames
from cellserve.models.signature import TensorSpec

_DTYPES = ("float32", "int32", "int64")
_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


def input_specs(model: Any) -> tuple[TensorSpec, ...]:
    """Returns the inputs: a single one is called `x`, several keep their names.

    An input that only `Embedding` layers read holds integers, whatever Keras declares; `input_dim` sets its bounds.
    `masked` is the value that `Masking`, or an `Embedding` with `mask_zero`, treats as a missing step.

    Raises:
        ExportError: An input has no open time axis, or a type that requests cannot carry.
    """
    specs = []
    names = _names(input_structure(model), model.inputs, "x")
    for place, (name, tensor) in enumerate(zip(names, model.inputs, strict=True)):
        shape = tuple(tensor.shape)
        if len(shape) < 2 or shape[1] is not None or None in shape[2:]:
            raise ExportError(
                f"the input {tensor.name!r} has shape {shape}, not [batch, time, *features] with an open time axis: "
                f"declare it as keras.Input((None, features)), and send constant inputs at every step"
            )
        calls = readers(model, place)
        layers = [getattr(call.operation, "layer", call.operation) for call in calls]  # unwraps TimeDistributed
        embeddings = [layer for layer in layers if isinstance(layer, keras.layers.Embedding)]
        dtype, bounds, masked = _dtype(tensor), _RANGES.get(str(tensor.dtype)), None
        if embeddings and len(embeddings) == len(layers) and dtype == "float32":
            dtype = "int32"
        sizes = [size for layer, call in zip(layers, calls, strict=True) if (size := _classes(layer, call))]
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
    """Returns the outputs: a single one is called `y`, several are named after their layers.

    Args:
        model: The Keras model.
        values: One time step of each output, `[batch, *shape]`.
        inputs: The inputs, whose names are taken.

    Raises:
        ExportError: An output has a type that answers cannot carry.
    """
    specs = []
    names = _names(output_structure(model), model.outputs, "y", [spec.name for spec in inputs])
    for name, value in zip(names, values, strict=True):
        dtype: Any = keras.backend.standardize_dtype(value.dtype)
        if dtype == model.layers[-1].compute_dtype:
            dtype = "float32"  # a float64 network is only run for comparison
        if dtype not in _DTYPES:
            raise ExportError(
                f"the output {name!r} is {dtype}; only {', '.join(_DTYPES)} can be served: cast it in the network"
            )
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(int(size) for size in value.shape[1:])))
    return tuple(specs)


def _names(structure: Any, tensors: list[Any], alone: str, taken: Sequence[str] = ()) -> list[str]:
    """Unique names of inputs or outputs: the keys if the model has a dictionary of them, otherwise the layers'."""
    keys = [alone] if len(tensors) == 1 else []
    if isinstance(structure, dict) and len(structure) == len(tensors) > 1:
        keys = sorted(structure)  # the order in which Keras flattens a dictionary
    operations = [_Key(key) for key in keys] or [producer(tensor) for tensor in tensors]
    names = UniqueNames(operations, taken)
    return [names.assign(operation) for operation in operations]


class _Key(NamedTuple):
    """A dictionary key, with the one attribute of a layer that naming needs."""

    name: str


def _classes(layer: Any, call: Reader) -> int | None:
    """Number of integers from 0 that a layer or operation accepts; None if it accepts all, or if that is not known.

    `take` and `take_along_axis` of Keras also count negative indices from the end; requests are held to the others.
    """
    if isinstance(layer, keras.layers.Embedding):
        return int(layer.input_dim)
    if isinstance(layer, keras.layers.CategoryEncoding):
        return int(layer.num_tokens)
    name = type(layer).__name__
    if name in ("Take", "TakeAlongAxis") and call.place == 1:
        shape = call.args[0].shape
        size = math.prod(shape) if layer.axis is None and None not in shape else shape[layer.axis or 0]
        return None if size is None else int(size)
    return int(layer.num_classes) if name in ("OneHot", "MultiHot") else None


def _dtype(tensor: Any) -> Any:
    dtype = str(tensor.dtype)
    if dtype in _DTYPES:
        return dtype
    if dtype == "string":
        raise ExportError(f"the input {tensor.name!r} holds strings: export the part after the string lookup")
    return "float32" if "float" in dtype else "int32"
