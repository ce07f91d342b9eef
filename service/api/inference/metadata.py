"""The protocol's descriptions of the server and its models: metadata, configuration, repository index."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from cellserve.models.signature import Signature, TensorSpec
from cellserve.service.api.inference.errors import NotByProtocol
from cellserve.service.api.inference.tensors import DATATYPES
from cellserve.service.engine.engine import Engine
from cellserve.service.model_manager import VersionState
from cellserve.service.model_repository.model import Model

EXTENSIONS = ("sequence", "sequence(string_id)", "binary_tensor_data", "model_configuration", "model_repository",
              "statistics", "parameters")  # fmt: skip
PLATFORM = "onnxruntime_onnx"  # Triton's name for ONNX Runtime


def server() -> dict[str, Any]:
    """Returns the server's metadata."""
    return {"name": "cellserve", "version": importlib.metadata.version("cellserve"), "extensions": list(EXTENSIONS)}


def metadata(model: Model, versions: list[str]) -> dict[str, Any]:
    """Returns a model's metadata with its available versions; -1 stands for any size.

    States are left out: the server keeps them. So is the optional input `lengths`: the protocol cannot mark an input as
    optional, and clients that generate data for every input (perf_analyzer) would send it.
    """
    signature = model.document.signature
    return {
        "name": model.name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": _tensors(signature, signature.inputs),
        "outputs": _tensors(signature, signature.outputs),
    }


def config(engine: Engine, idle_seconds: float) -> dict[str, Any]:
    """Returns a model's configuration, as the JSON of Triton's ModelConfig (model_config.proto).

    Args:
        engine: The model's engine.
        idle_seconds: The idle time after which a sequence expires.
    """
    model = engine.model
    signature = model.document.signature
    sequences = {"max_sequence_idle_microseconds": int(1e6 * idle_seconds), "oldest": {}}
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [model.version]}},
        "max_batch_size": engine.max_batch,
        "input": _configured(signature, signature.inputs),
        "output": _configured(signature, signature.outputs),
        **({} if signature.predict_only else {"sequence_batching": sequences}),
        "default_model_filename": "model.onnx",
        "model_transaction_policy": {"decoupled": False},
    }


def index(states: Iterable[VersionState]) -> list[dict[str, str]]:
    """Returns the repository's index: all versions with their states."""
    words = {"serving": "READY", "draining": "READY", "loaded": "READY", "refused": "UNAVAILABLE"}
    # Other states are ready too: a version that is only on disk is loaded on request.
    return [
        {
            "name": one.key.name,
            "version": str(one.key.version),
            "state": words.get(one.state, "READY"),
            "reason": one.reason,
        }
        for one in states
    ]


def loading_unsupported() -> NotByProtocol:
    """Returns the error for requests to load or unload a model."""
    return NotByProtocol(
        "models are not loaded or unloaded over this protocol: the operator adds NAME/VERSION/ to the folder of "
        "--models, or removes it"
    )


def _tensors(signature: Signature, specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": [-1, *_axes(signature, spec)]} for spec in specs
    ]


def _configured(signature: Signature, specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "data_type": f"TYPE_{DATATYPES[spec.dtype]}", "dims": _axes(signature, spec)}
        for spec in specs
    ]


def _axes(signature: Signature, spec: TensorSpec) -> list[int]:
    """Returns a tensor's axes without the batch."""
    return [*([-1] if signature.time_axis else []), *spec.shape]
