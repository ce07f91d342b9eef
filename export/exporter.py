"""Exports a saved Keras network: loads it, builds and proves candidates, writes the best one, reports the results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from cellserve.export.candidates import candidates
from cellserve.export.candidates.candidates import Candidate
from cellserve.export.candidates.quantization import QuantizationResult, quantize
from cellserve.export.errors import ExportError, Unsteppable
from cellserve.export.keras_model.load import load
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.publish import compatibility, repository_writer
from cellserve.export.report import html
from cellserve.export.report.console import Results, show
from cellserve.export.verify.benchmark import side_by_side
from cellserve.export.verify.evaluation import TestData
from cellserve.models import cells  # noqa: F401  registers the cells for loading
from cellserve.models.signature import (
    MODEL_NAME,
    STEP_NAME,
    Exactness,
    ModelDocument,
    Precision,
    Rollout,
    checked_labels,
    rollout_misfit,
)
from cellserve.service.runtime.onnx_model import Runtime

REPORT_NAME = "report.html"  # written beside the model for people; the service does not read it
LIBRARIES = ("keras", "onnx", "onnxruntime", "tensorflow", "tf2onnx")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Which network to export, how, and what its model file says about it."""

    network: Path
    name: str
    artifacts: Path = Path("artifacts")
    version: int | None = None
    labels: tuple[str, ...] | None = None  # labels, description, default_output and rollout override the network's card
    description: str | None = None
    default_output: Literal["last", "all"] | None = None
    rollout: Rollout | None = None
    data: Path | None = None
    imports: tuple[Path, ...] = ()
    precision: Precision = "float32"
    tolerance: float | None = None  # allowed loss of each test metric; None for the default


def export(request: ExportRequest, console: Console) -> Path:
    """Exports one network; returns the folder that it was written to.

    Raises:
        ExportError: It cannot be exported, or a proof failed; nothing has been written.
    """
    repository_writer.check_writable(request.artifacts, request.name, request.version)
    for path in request.imports:
        _import(path)
    card = _card(request.network)
    with console.status("loading") as status:
        network = network_of(load(request.network))
        document = _document(request, network, card)
        data = _test_data(request, network)
        tried = candidates.build_candidates(network, document, progress=status.update)
        quantized: QuantizationResult | None = None
        if data and request.precision != "float32":
            quantized = quantize(tried, request.precision, document, data, request.tolerance, status.update)
            tried = quantized.tried
        chosen = quantized.candidate if quantized else candidates.best(tried)
        status.update("measuring beside tf2onnx and Keras")
        measured = [chosen, quantized.float32] if quantized else [chosen]
        runtimes = [candidates.open_model(each.model, each.step, document) for each in measured]
        timings, tf2onnx = side_by_side(network, *runtimes)
        status.update("evaluating on the test data")
        metrics = _metrics(data, runtimes[0]) if data else {}
        document = document.model_copy(
            update={
                "precision": request.precision,
                "form": chosen.name,
                "operators": chosen.operators,
                "parity": _parity_figures(chosen, quantized),
                "exactness": chosen.exactness,
                "timings": {"unit": "microseconds a run, 1 thread, by batch x time", "tf2onnx": tf2onnx, **timings},
                "metrics": {**card.get("metrics", {}), **{name: ours for name, (ours, _) in metrics.items()}},
            }
        )
        files = {MODEL_NAME: candidates.with_document(chosen.model, document)}
        if chosen.step:
            files[STEP_NAME] = candidates.with_document(chosen.step, document)
        warning = compatibility.warning(request.artifacts, request.name, document.signature)
        size = sum(map(len, files.values()))
        results = Results(document, chosen, tried, size, timings, tf2onnx, metrics, quantized, warning)
        files[REPORT_NAME] = html.render(results, network).encode()
        folder = repository_writer.write(request.artifacts, request.name, request.version, files)
    show(console, str(folder), results)
    return folder


def _test_data(request: ExportRequest, network: StatefulNetwork | SequenceNetwork) -> TestData | None:
    if request.data and isinstance(network, SequenceNetwork):
        raise ExportError(f"--data: a network that cannot be stepped is not scored, leave it out ({network.reason})")
    path = request.data or _beside(request.network, ".npz")
    if path and isinstance(network, StatefulNetwork):
        return TestData(network, path)
    if request.precision != "float32":
        raise ExportError(
            f"{request.precision} needs test data, to measure its loss, and a network that can be stepped: "
            f"give --data FILE.npz (x [n, time, *features], lengths [n], y)"
        )
    return None


def _metrics(data: TestData, runtime: Runtime) -> dict[str, tuple[float, float]]:
    """The score of each test metric, as (ONNX, Keras)."""
    keras_scores = data.score_keras(runtime)
    return {name: (ours, keras_scores[name]) for name, ours in data.score(runtime).items()}


def _parity_figures(chosen: Candidate, quantized: QuantizationResult | None) -> dict[str, Any]:
    figures = chosen.parity.figures()
    if quantized:
        del figures["tolerance"]  # it is for float32; here the loss on the test data decides
        figures.update(test_metrics_float32=quantized.before, test_metrics_tolerance=quantized.tolerance)
    return figures


def network_of(model: Any) -> StatefulNetwork | SequenceNetwork:
    """Analyses a Keras model as a network of steps, or of whole sequences if it cannot be stepped."""
    try:
        return StatefulNetwork(model)
    except Unsteppable as reason:
        return SequenceNetwork(model, str(reason))


def _import(path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"--import {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ExportError(f"--import {path}: not a Python file")
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)  # like a script, it may import its neighbours
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        raise ExportError(f"--import {path}: {type(error).__name__}: {error}") from None
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _beside(network: Path, suffix: str) -> Path | None:
    path = network.with_suffix(suffix)
    return path if path.is_file() else None


def _card(network: Path) -> dict[str, Any]:
    """Reads the network's NAME.card.json, if there is one: labels, metrics, rollout and more, as training wrote it."""
    path = _beside(network, ".card.json")
    if path is None:
        return {}
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise ExportError(f"{path}: invalid JSON: {error}") from None
    return dict(card)


def _document(
    request: ExportRequest, network: StatefulNetwork | SequenceNetwork, card: dict[str, Any]
) -> ModelDocument:
    labels = request.labels
    if not labels and card.get("labels"):
        try:
            labels = checked_labels(card["labels"])
        except ValueError as error:
            raise ExportError(f"{request.network.with_suffix('.card.json')}: {error}") from None
    shape = network.outputs[0].shape
    if labels and (len(network.outputs) > 1 or not shape or len(labels) != shape[-1]):
        raise ExportError(f"{len(labels)} labels for an output of shape {list(shape)}: give one label per entry")
    rollout = request.rollout or card.get("rollout")
    if rollout:
        misfit = rollout_misfit(network.signature, rollout)
        if misfit:
            raise ExportError(f"rollout {rollout!r}: {misfit}")
    default = request.default_output or card.get("default_output")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return ModelDocument(
        name=request.name,
        description=card.get("description", "") if request.description is None else request.description,
        labels=labels,
        rollout=rollout,
        signature=network.signature.model_copy(update={"default_output": default} if default else {}),
        exactness=Exactness(proved=False, why="not proved yet"),
        provenance={
            "source": request.network.name,
            "source_sha256": hashlib.sha256(request.network.read_bytes()).hexdigest(),
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
            **versions,
        },
    )
