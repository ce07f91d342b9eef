"""Exports a saved Keras network: loads it, chooses its form, proves it, writes it, says what came out."""

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
from cellserve.export.candidates.quantization import Narrowed, narrowed
from cellserve.export.errors import ExportError, Unsteppable
from cellserve.export.keras_model.load import load
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.onnx_graph.sequence_network import WholeNetwork
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

REPORT_NAME = "report.html"  # beside the model, for people; the service does not read it
LIBRARIES = ("keras", "onnx", "onnxruntime", "tensorflow", "tf2onnx")


@dataclass(frozen=True, slots=True)
class Request:
    """What to export, and what to say about it in the model file."""

    network: Path
    name: str
    artifacts: Path = Path("artifacts")
    version: int | None = None
    labels: tuple[str, ...] | None = None  # these four win over the network's card
    description: str | None = None
    default_output: Literal["last", "all"] | None = None
    rollout: Rollout | None = None
    data: Path | None = None
    imports: tuple[Path, ...] = ()
    precision: Precision = "float32"
    tolerance: float | None = None  # what may be lost of each test metric; None for its default


def export(request: Request, console: Console) -> Path:
    """Exports one network; gives the folder that it was written to.

    Raises:
        ExportError: It cannot be exported, or the proof failed; nothing has been written.
    """
    repository_writer.check(request.artifacts, request.name, request.version)
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
        data_path = request.data or _beside(request.network, ".npz")
        data = TestData(network, data_path) if data_path and isinstance(network, StatefulNetwork) else None
        if data is None and request.precision != "float32":
            raise ExportError(
                f"{request.precision}: what it costs is measured on test data, of a network that can be stepped: "
                f"give it with --data FILE.npz (x [n, time, *features], lengths [n], y)"
            )
        tried = candidates.all_forms(network, document, report=status.update)
        form = candidates.best(tried)
        narrow: Narrowed | None = None
        if data and request.precision != "float32":
            narrow = narrowed(tried, request.precision, document, data, request.tolerance, status.update)
            form, tried = narrow.form, narrow.tried
        status.update("measuring beside tf2onnx and Keras")
        measured = (form, *([narrow.float32] if narrow else []))
        opened = [candidates.open_model(each.model, each.step, document) for each in measured]
        timings, tf2onnx = side_by_side(network, *opened)
        parity = form.parity.figures()
        if narrow:
            del parity["tolerance"]  # that of float32: here the test metrics decide
            parity.update(test_metrics_float32=narrow.before, test_metrics_tolerance=narrow.tolerance)
        document = document.model_copy(
            update={
                "precision": request.precision,
                "form": form.name,
                "operators": form.operators,
                "parity": parity,
                "exactness": form.exactness,
                "timings": {"unit": "microseconds a run, 1 thread, by batch x time", "tf2onnx": tf2onnx, **timings},
            }
        )
        metrics: dict[str, tuple[float, float]] = {}
        if data:
            status.update("evaluating on the test data")
            runtime = candidates.open_model(form.model, form.step, document)
            keras_scores = data.score_keras(runtime)
            metrics = {name: (ours, keras_scores[name]) for name, ours in data.score(runtime).items()}
        document = document.model_copy(
            update={"metrics": {**card.get("metrics", {}), **{name: ours for name, (ours, _) in metrics.items()}}}
        )
        files = {MODEL_NAME: candidates.with_document(form.model, document)}
        if form.step:
            files[STEP_NAME] = candidates.with_document(form.step, document)
        warning = compatibility.warning(request.artifacts, request.name, document.signature)
        size = sum(map(len, files.values()))
        results = Results(document, form, tried, size, timings, tf2onnx, metrics, narrow, warning)
        files[REPORT_NAME] = html.render(results, network).encode()
        folder = repository_writer.write(request.artifacts, request.name, request.version, files)
    show(console, str(folder), results)
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
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)  # as for a script: it may import its neighbours
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
    """Reads what training has said about a network beside it, in NAME.card.json: labels, metrics, rollout."""
    path = _beside(network, ".card.json")
    if path is None:
        return {}
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise ExportError(f"{path}: not JSON: {error}") from None
    return dict(card)


def _document(request: Request, network: StatefulNetwork | WholeNetwork, card: dict[str, Any]) -> ModelDocument:
    labels = request.labels
    if not labels and card.get("labels"):
        try:
            labels = checked_labels(card["labels"])
        except ValueError as error:
            raise ExportError(f"{request.network.with_suffix('.card.json')}: {error}") from None
    shape = network.outputs[0].shape
    if labels and (len(network.outputs) > 1 or not shape or len(labels) != shape[-1]):
        raise ExportError(f"{len(labels)} labels for an output of shape {list(shape)}: give one for each entry")
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
