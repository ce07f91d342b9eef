"""Loads a saved Keras model and makes it fit to serve: any batch, any number of time steps, float32, stateless.

Config entries about training or about one shape (`stateful`, `unroll`, a fixed batch or time axis, mixed precision) are
rewritten; weights stay. The parity check compares with the model as it was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from cellserve.export.errors import ExportError, first_line
from cellserve.export.keras_model.keras_private import all_layers, has_graph
from cellserve.export.keras_model.load_errors import explain_load_error
from cellserve.export.keras_model.network_file import check_network_file

# Arguments of recurrent layers and cells. A dropout draws random numbers even where it has no effect.
_TRAINING_OR_ONE_SHAPE = ("stateful", "unroll", "dropout", "recurrent_dropout")


def load(path: Path) -> Any:
    """Loads a saved model; one of mixed precision in float32, the precision of its weights.

    Raises:
        ExportError: There is no such file, or Keras cannot load it.
    """
    check_network_file(path)
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:
        raise ExportError(f"{path} cannot be loaded: {explain_load_error(path, error)}") from None
    types = {layer.dtype_policy.compute_dtype for layer in all_layers(model)}
    mixed = any(_is_float(each) and each != "float32" for each in types)  # layers of integers compute in theirs
    return with_dtype(model, "float32") if mixed and has_graph(model) else model


def with_dtype(model: Any, dtype: str) -> Any:
    """Returns a copy of a Keras model that stores and computes in `dtype`, with the same weights."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        if config.get("class_name") == "DTypePolicy" and _is_float(config["config"]["name"]):
            return {**config, "config": {**config["config"], "name": dtype}}
        return {key: dtype if key == "dtype" and _is_float(value) else value for key, value in config.items()}

    with computing_in(dtype):
        return _rebuilt(model, change)


@contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Makes a type Keras's default, for what has none of its own: layers and zeros that a cell creates, say."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def with_open_shapes(model: Any) -> Any:
    """Returns a copy of a model that takes any batch and any number of time steps and keeps nothing between calls.

    Raises:
        ExportError: The model hides its layers, or works for one number of time steps only.
    """
    if not isinstance(model, keras.Model) or not has_graph(model) or not model.inputs:
        raise ExportError(
            "only Sequential and functional models can be exported, a subclassed model hides its layers: "
            "build it as keras.Sequential([...]) or keras.Model(inputs, outputs)"
        )
    times = {tensor.shape[1] for tensor in model.inputs if len(tensor.shape) > 1}
    fixed = any(tensor.shape[0] is not None for tensor in model.inputs) or times != {None}
    bound = any(getattr(layer, key, False) for layer in all_layers(model) for key in _TRAINING_OR_ONE_SHAPE)
    if not fixed and not bound:
        return model
    time = times.pop() if len(times) == 1 else None
    ranks = {len(tensor.shape) for tensor in model.inputs}

    def change(config: dict[str, Any]) -> dict[str, Any]:
        reset = _TRAINING_OR_ONE_SHAPE if "recurrent_dropout" in config or "stateful" in config else ()
        config = {key: type(value)(0) if key in reset else value for key, value in config.items()}
        shape = config.get("batch_shape")
        if shape:
            open_time = len(shape) in ranks and len(shape) > 1 and shape[1] == time
            config["batch_shape"] = [None, None if open_time else shape[1], *shape[2:]] if len(shape) > 1 else [None]
        return config

    try:
        return _rebuilt(model, change)
    except Exception as error:
        reason = first_line(error)
        if time is None:
            raise ExportError(
                f"the network cannot be rebuilt from its config ({reason}): a layer of your own needs a get_config "
                f"that returns its constructor's arguments"
            ) from None
        raise ExportError(
            f"the network takes {time} time steps and no other number ({reason}): declare its input as "
            f"keras.Input((None, features)) and leave out what needs the number, such as Flatten"
        ) from None


def _rebuilt(model: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Returns a copy of a model with `change` applied to every object of its config, and the same weights."""

    def changed(config: Any) -> Any:
        if isinstance(config, dict):
            return change({key: changed(value) for key, value in config.items()})
        return [changed(value) for value in config] if isinstance(config, list | tuple) else config

    copy = type(model).from_config(changed(model.get_config()))
    copy.set_weights(model.get_weights())
    for layer in all_layers(copy):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with copies of its weights, which only this call refreshes
    return copy


def _is_float(dtype: Any) -> bool:
    return isinstance(dtype, str) and "float" in dtype
