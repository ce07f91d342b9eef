"""The inputs and outputs of a Keras network as a model's signature has them: names, types, shapes, bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from export.errors import ExportError
from export.walking import readers
from models.signature import TensorSpec

_DTYPES = ("float32", "int32", "int64")


def input_specs(model: Any) -> tuple[TensorSpec, ...]:
    """Gives the inputs: one is called `x`, several keep their names.

    An input that only `Embedding` layers read holds integers, whatever Keras says of it; they give it its bounds. What
    `Masking`, or an `Embedding` with `mask_zero`, takes for a step to pass over is told too.

    Raises:
        ExportError: An input has no time axis that is left open, or a type that no request can carry.
    """
    specs = []
    for place, tensor in enumerate(model.inputs):
        name = "x" if len(model.inputs) == 1 else tensor.name
        shape = tuple(tensor.shape)
        if len(shape) < 2 or shape[1] is not None or None in shape[2:]:
            raise ExportError(
                f"the input {tensor.name!r} has shape {shape}, not [batch, time, *features] with the time left open: "
                f"declare it as keras.Input((None, features)); what does not change with time is sent at every step"
            )
        layers = readers(model, place)
        embeddings = [layer for layer in layers if isinstance(layer, keras.layers.Embedding)]
        dtype, bounds, masked = _dtype(tensor), None, None
        if embeddings and len(embeddings) == len(layers):
            dtype = dtype if dtype.startswith("int") else "int32"
            bounds = 0, min(layer.input_dim for layer in embeddings) - 1
            masked = 0.0 if any(layer.mask_zero for layer in embeddings) else None
        encodings = [layer for layer in layers if isinstance(layer, keras.layers.CategoryEncoding)]
        if encodings and len(encodings) == len(layers):
            bounds = 0, min(layer.num_tokens for layer in encodings) - 1
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
    taken = {spec.name for spec in inputs}
    specs = []
    for place, value in enumerate(values):
        name = name_of = "y" if len(values) == 1 else str(model.output_names[place])
        count = 1
        while name in taken:
            count += 1
            name = f"{name_of}_{count}"
        taken.add(name)
        dtype: Any = keras.backend.standardize_dtype(value.dtype)
        if dtype == model.layers[-1].compute_dtype:
            dtype = "float32"  # in float64 a network is run for comparison only
        if dtype not in _DTYPES:
            raise ExportError(
                f"the output {name!r} is of {dtype}, which is none of {', '.join(_DTYPES)}: cast it in the network"
            )
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(int(size) for size in value.shape[1:])))
    return tuple(specs)


def _dtype(tensor: Any) -> Any:
    dtype = str(tensor.dtype)
    if dtype in _DTYPES:
        return dtype
    if dtype == "string":
        raise ExportError(f"the input {tensor.name!r} is of strings: export the network behind its lookup of strings")
    return "float32" if "float" in dtype else "int32"
