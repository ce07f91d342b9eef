"""Reads and checks an ONNX file that was made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import external_data_helper

from cellserve.export.adopt.onnx_private import all_tensors
from cellserve.export.errors import ExportError
from cellserve.export.onnx_graph.builder import all_nodes

# Domains whose operators ONNX Runtime has built in; no library of custom operators is ever loaded.
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
_LARGEST_BYTES = 2**31 - 1  # limit of a protocol buffer


def load_foreign(path: Path) -> Any:
    """Returns the model in an ONNX file, with its external data.

    Raises:
        ExportError: It is not an ONNX file, is too large, or has data outside its folder.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path}: not an ONNX file ({type(error).__name__})") from None
    if not model.graph.node:
        raise ExportError(f"{path}: not an ONNX file, or one without a single node")
    home = path.resolve().parent
    for tensor in all_tensors(model):
        if not external_data_helper.uses_external_data(tensor):
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (home / location).resolve()
        if not file.is_relative_to(home) or not file.is_file():
            raise ExportError(
                f"{path}: the data of {tensor.name!r} is in {location!r}, which is not a file in the model's folder"
            )
    try:
        external_data_helper.load_external_data_for_model(model, str(home))
    except Exception as error:
        raise ExportError(f"{path}: its external data cannot be read: {str(error).splitlines()[0]}") from None
    if model.ByteSize() > _LARGEST_BYTES:
        raise ExportError(f"{path}: with its external data it has {model.ByteSize()} bytes, one file holds 2 GiB")
    return model


def check_operators(model: Any, opset: int) -> None:
    """Raises an ExportError if a model needs custom operators or a later ONNX."""
    own = {(function.domain, function.name) for function in model.functions}
    nodes = list(all_nodes(model.graph.node))
    for function in model.functions:
        nodes += all_nodes(function.node)
    custom = {
        f"{node.domain}::{node.op_type}"
        for node in nodes
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own
    }
    if custom:
        raise ExportError(
            f"it needs custom operators, which are not loaded: {', '.join(sorted(custom))}: export it without them"
        )
    known = onnx.defs.onnx_opset_version()
    if opset > known:
        raise ExportError(
            f"its opset is {opset}, but only opsets up to {known} are supported: export it with an older one"
        )
