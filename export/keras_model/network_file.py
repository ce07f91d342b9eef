"""Says what a file or folder is that no network can be loaded from, and what to do; imports no TensorFlow."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from cellserve.export.errors import ExportError, did_you_mean

_HDF5 = b"\x89HDF\r\n\x1a\n"
_SAVE = "save the network with model.save('NAME.keras')"
_ADOPT = "`cellserve adopt` takes ONNX models"


def check_network_file(path: Path) -> None:
    """Checks that a network may be loaded from a file, without loading it.

    Raises:
        ExportError: It is certain that Keras cannot load it; the message says what it is, and what to do.
    """
    try:
        reason = _folder(path) if path.is_dir() else _file(path)
    except FileNotFoundError:
        raise ExportError(
            f"{path}: no such file{_neighbour(path)}: save the network with model.save('NAME.keras') and give its path"
        ) from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}): give a file that you may read") from None
    if reason:
        raise ExportError(f"{path} cannot be loaded: {reason}")


def config_of(path: Path) -> dict[str, Any] | None:
    """The config in a .keras archive, without the part for training; None if the file is not a whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
        return {key: value for key, value in config.items() if key != "compile_config"}
    except (ValueError, KeyError, AttributeError, zipfile.BadZipFile):
        return None


def _neighbour(path: Path) -> str:
    try:
        return did_you_mean(str(path), (str(path.parent / each.name) for each in path.parent.iterdir()))
    except OSError:
        return ""


def _folder(path: Path) -> str:
    if (path / "saved_model.pb").exists() or (path / "keras_metadata.pb").exists():
        return (
            "it is a TensorFlow SavedModel, which holds graphs and not the layers: load it with the version of Keras "
            "that saved it, and save the network with model.save('NAME.keras')"
        )
    if (path / "config.json").exists():
        return "it is a network saved as a folder (zipped=False): save it as one file with model.save('NAME.keras')"
    files = sorted(each.name for each in path.glob("*.keras"))
    return f"it is a folder: give a file{f' in it, such as {path / files[0]}' if files else f', {_SAVE}'}"


def _file(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(len(_HDF5))
    name = path.name.lower()
    if not start:
        return f"it is empty: {_SAVE} and copy the whole file"
    if name.endswith(".weights.h5") or (start == _HDF5 and not _holds_layers(path)):
        return (
            "it holds weights without layers (save_weights): build the network in Python, call "
            "model.load_weights(...), and save it with model.save('NAME.keras')"
        )
    if start == _HDF5:
        if name.endswith((".h5", ".hdf5")):
            return None  # the format of earlier versions of Keras, which it still loads
        return "it is an HDF5 file (model.save('NAME.h5')): give it a name that ends in .h5, or save it as NAME.keras"
    if name.endswith((".h5", ".hdf5")):
        return f"it is not an HDF5 file, or an incomplete one: {_SAVE} and copy the whole file"
    if name.endswith(".pb"):
        return "it is a graph of TensorFlow, which holds no layers: save the network with model.save('NAME.keras')"
    if name.endswith(".onnx"):
        return f"it is an ONNX model: {_ADOPT}"
    if name.endswith((".pt", ".pth", ".ckpt", ".safetensors")):
        return f"it holds weights of PyTorch or TensorFlow without layers: {_SAVE}; of PyTorch export ONNX, {_ADOPT}"
    if name.endswith(".tflite"):
        return f"it is a model of TensorFlow Lite, which holds no layers: {_SAVE}"
    if not name.endswith(".keras"):
        return "its name does not end in .keras: give a file that was written by model.save('NAME.keras')"
    if config_of(path) is None:
        return (
            "it is not a .keras archive, or an incomplete one: save the network with model.save('NAME.keras') and copy "
            "the whole file"
        )
    return None


def _holds_layers(path: Path) -> bool:
    """Whether an HDF5 file holds a network's config, or cannot be opened at all, which loading it will tell."""
    import h5py  # comes with Keras

    try:
        with h5py.File(path) as file:
            return "model_config" in file.attrs
    except OSError:
        return True
