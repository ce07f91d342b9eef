"""Explains in one sentence why Keras cannot load a file; Keras's own message prints the whole config."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from cellserve.export.errors import first_line
from cellserve.export.keras_model.network_file import config_of


def explain_load_error(path: Path, error: Exception) -> str:
    """Returns the reason in one sentence, and what to do.

    Args:
        path: The file, which `check_network_file` has let pass.
        error: The exception that Keras raised.
    """
    config = config_of(path)
    for layer in _objects(config):
        if layer["class_name"] == "Lambda" and "__lambda__" in str(layer["config"]):
            return (
                f"layer {layer['config'].get('name')!r} is a Lambda with Python code in it, which is not loaded from a "
                f"file: write a layer class or use operations of keras.ops, and save the network again"
            )
    for each in _objects(config):
        name = _unknown(each)
        if name is not None:
            kind = "function" if each["class_name"] == "function" else "class"
            if ">" in name:
                return (
                    f"the {kind} {name.rpartition('>')[2]!r} (registered as {name!r}) is not known: give the Python "
                    f"file that defines and registers it with --import FILE.py"
                )
            return (
                f"the {kind} {name!r} was not registered when the network was saved: decorate it with "
                f"@keras.saving.register_keras_serializable(), save the network again, and give the Python file that "
                f"defines it with --import FILE.py"
            )
    if isinstance(error, zipfile.BadZipFile):
        return f"the archive is damaged ({first_line(error)}): copy it again, or save the network again"
    inner = re.findall(r"Exception encountered: (.+)", str(error))
    return f"Keras says {type(error).__name__}: {inner[-1].split('. ')[0] if inner else first_line(error)}"


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """Yields every serialized object within a config: layers, cells, functions."""
    if isinstance(config, dict):
        if {"class_name", "config", "registered_name"} <= config.keys():
            yield config
        for value in config.values():
            yield from _objects(value)
    elif isinstance(config, list):
        for value in config:
            yield from _objects(value)


def _unknown(config: dict[str, Any]) -> str | None:
    """The registered name of a class or function that Keras does not know; None if it knows it."""
    if config["class_name"] != "function":
        name = config["registered_name"]  # empty for Keras's own classes
        return str(name) if name and keras.saving.get_registered_object(name) is None else None
    try:
        keras.saving.deserialize_keras_object(config)
    except Exception:
        return str(config["config"])
    return None
