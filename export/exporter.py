"""Exports a saved Keras network: loads it, chooses its form, proves it, writes it, says what came out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from export import artifacts, forms, report
from export.errors import ExportError, Unsteppable
from export.loading import load
from export.stateful import StatefulNetwork
from export.whole import WholeNetwork
from models import cells  # noqa: F401  registers the cells for loading
from models.metrics import evaluate
from models.signature import MODEL_NAME, STEP_NAME, Exactness, ModelDocument
from service.runtime import Runtime

LIBRARIES = ("keras", "onnx", "onnxruntime", "tensorflow", "tf2onnx")


@dataclass(frozen=True, slots=True)
class Request:
    """What to export, and what to say about it in the model file."""

    network: Path
    name: str
    artifacts: Path = Path("artifacts")
    version: int | None = None
    labels: tuple[str, ...] | None = None
    data: Path | None = None
    imports: tuple[Path, ...] = ()


def export(request: Request, console: Console) -> Path:
    """Exports one network; gives the folder that it was written to.

    Raises:
        ExportError: It cannot be exported, or the proof failed; nothing has been written.
    """
    for path in request.imports:
        _import(path)
    card = _card(request.network)
    with console.status("loading") as status:
        network = network_of(load(request.network))
        if request.data and isinstance(network, WholeNetwork):
            raise ExportError(
                f"--data: a network that cannot be stepped is not scored, leave it out ({network.reason})"
            )
        document = _document(request, network, card)
        tried = forms.all_forms(network, document, report=status.update)
        form = forms.best(tried)
        status.update("measuring beside tf2onnx's Loop and Keras")
        timings = forms.side_by_side(network, form, document)
        document = document.model_copy(
            update={
                "form": form.name,
                "operators": form.operators,
                "parity": form.parity.figures(),
                "exactness": form.exactness,
                "timings": {"unit": "microseconds a run, 1 thread, by batch x time", **timings},
            }
        )
        metrics: dict[str, tuple[float, float]] = {}
        data = request.data or _beside(request.network, ".npz")
        if data and isinstance(network, StatefulNetwork):
            status.update("evaluating on the test data")
            metrics = _evaluate(network, forms.open_model(form.model, form.step, document), data)
        document = document.model_copy(
            update={"metrics": {**card.get("metrics", {}), **{name: ours for name, (ours, _) in metrics.items()}}}
        )
        files = {MODEL_NAME: forms.with_document(form.model, document)}
        if form.step:
            files[STEP_NAME] = forms.with_document(form.step, document)
        folder = artifacts.write(request.artifacts, request.name, request.version, files)
    size = sum(map(len, files.values()))
    report.show(console, str(folder), form, tried, size, timings, metrics, document.signature.predict_only)
    return folder


def network_of(model: Any) -> StatefulNetwork | WholeNetwork:
    """Takes a Keras model apart: into steps, or where it cannot be stepped into what reads whole sequences."""
    try:
        return StatefulNetwork(model)
    except Unsteppable as reason:
        return WholeNetwork(model, str(reason))


def _import(path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"--import {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ExportError(f"--import {path}: not a Python file")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        raise ExportError(f"--import {path}: {type(error).__name__}: {error}") from None


def _beside(network: Path, suffix: str) -> Path | None:
    path = network.with_suffix(suffix)
    return path if path.is_file() else None


def _card(network: Path) -> dict[str, Any]:
    """Reads what training has said about a network beside it, in NAME.card.json: labels, metrics, description."""
    path = _beside(network, ".card.json")
    if path is None:
        return {}
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise ExportError(f"{path}: not JSON: {error}") from None
    return dict(card)


def _document(request: Request, network: StatefulNetwork | WholeNetwork, card: dict[str, Any]) -> ModelDocument:
    labels = request.labels or (tuple(card["labels"]) if card.get("labels") else None)
    shape = network.outputs[0].shape
    if labels and (len(network.outputs) > 1 or not shape or len(labels) != shape[-1]):
        raise ExportError(f"{len(labels)} labels for an output of shape {list(shape)}: give one for each entry")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return ModelDocument(
        name=request.name,
        description=card.get("description", ""),
        labels=labels,
        signature=network.signature.model_copy(
            update={"default_output": card["default_output"]} if "default_output" in card else {}
        ),
        exactness=Exactness(proved=False, why="not proved yet"),
        provenance={
            "source": request.network.name,
            "source_sha256": hashlib.sha256(request.network.read_bytes()).hexdigest(),
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
            **versions,
        },
    )


def _evaluate(network: StatefulNetwork, runtime: Runtime, path: Path) -> dict[str, tuple[float, float]]:
    """Gives each metric on the test data, of the ONNX model and of Keras."""
    if not path.is_file():
        raise ExportError(f"--data {path}: no such file")
    if len(network.inputs) > 1 or len(network.outputs) > 1:
        raise ExportError(f"{path}: test data is scored for networks of one input and one output: leave --data out")
    spec = network.inputs[0]
    try:
        with np.load(path) as file:
            data = dict(file)
        x, lengths = data["x"].astype(spec.dtype), data["lengths"].astype(np.int32)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{path}: not test data ({error}): an .npz with x, lengths and y is wanted") from None
    if x.shape[2:] != spec.shape or x.shape[:1] != lengths.shape:
        raise ExportError(
            f"{path}: x has shape {list(x.shape)} and lengths {list(lengths.shape)}, "
            f"[n, time, {', '.join(map(str, spec.shape))}] and [n] are wanted"
        )
    ours, _ = runtime.run(np.ascontiguousarray(x), lengths, runtime.zeros(len(x)))
    mask = np.arange(x.shape[1]) < lengths[:, None]
    (keras_y,), _ = network.run([x], runtime.zeros(len(x)), mask)
    scored, keras_scored = evaluate(ours, data), evaluate(np.asarray(keras_y), data)
    return {name: (value, keras_scored[name]) for name, value in scored.items()}
