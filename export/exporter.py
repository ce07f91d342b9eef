"""Exports a saved Keras network: loads it, builds and proves candidates, writes the best one, reports the results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tensorflow as tf
from rich.console import Console

from cellserve.export.candidates import candidates
from cellserve.export.candidates.candidates import Candidate
from cellserve.export.candidates.quantization import QuantizationResult, quantize
from cellserve.export.errors import ExportError, Unsteppable, explain_unforeseen
from cellserve.export.keras_model.load import load
from cellserve.export.keras_model.naming import number_layers
from cellserve.export.keras_model.step_network import StatefulNetwork
from cellserve.export.keras_model.unservable import refuse_unservable
from cellserve.export.onnx_graph.sequence_network import SequenceNetwork
from cellserve.export.publish import compatibility, repository_writer
from cellserve.export.publish.request import ExportRequest
from cellserve.export.publish.samples import samples_of
from cellserve.export.report import html
from cellserve.export.report.console import Results, show
from cellserve.export.report.network_layers import layers_of
from cellserve.export.report.page import REPORT_NAME
from cellserve.export.verify.benchmark import NO_ALTERNATIVES, alternatives
from cellserve.export.verify.evaluation import TestData
from cellserve.models import cells  # noqa: F401  registers the cells for loading
from cellserve.models.signature import (
    MODEL_NAME,
    STEP_NAME,
    Exactness,
    ModelDocument,
    checked_labels,
    natural_task,
    rollout_misfit,
    task_misfit,
)
from cellserve.service.runtime.onnx_model import Runtime

LIBRARIES = ("keras", "onnx", "onnxruntime", "tf2onnx")


def export(request: ExportRequest, console: Console, progress: Callable[[str], None] = lambda stage: None) -> Path:
    """Exports one network and prints the results; returns the folder that it was written to.

    Args:
        request: What to export, and how.
        console: Where to print the results.
        progress: Called with a description of each stage as it begins.

    Raises:
        ExportError: It cannot be exported, or a proof failed; nothing has been written.
    """
    folder, results = write_model(request, progress)
    show(console, folder, results)
    return folder


def write_model(request: ExportRequest, progress: Callable[[str], None]) -> tuple[Path, Results]:
    """Exports one network; returns the folder that it was written to, and the results.

    Raises:
        ExportError: It cannot be exported, or a proof failed; nothing has been written.
    """
    request.check()
    try:
        return _write_model(request, progress)
    except (ExportError, OSError):
        raise
    except Exception as error:  # from Keras, TensorFlow, NumPy, tf2onnx, ONNX or ONNX Runtime
        raise ExportError(explain_unforeseen(error)) from error


def _write_model(request: ExportRequest, progress: Callable[[str], None]) -> tuple[Path, Results]:
    progress(f"loading {request.network}")
    for path in request.imports:
        _import(path)
    card = request.card()
    network = network_of(load(request.network))
    document = _document(request, network, card)
    data = _test_data(request, network)
    tried = candidates.build_candidates(network, document, progress)
    beside = NO_ALTERNATIVES
    if not request.quick:
        progress("converting with tf2onnx alone, to compare times")
        beside = alternatives(network)
    quantized: QuantizationResult | None = None
    if data and request.precision != "float32":
        progress("measuring the float32 forms in turn")
        tried, _ = candidates.measure(tried, document)
        quantized = quantize(tried, request.precision, document, data, request.tolerance, beside, progress)
        tried, others = quantized.tried, quantized.others
    else:
        progress("measuring all forms in turn")
        tried, others = candidates.measure(tried, document, beside)
    chosen = quantized.candidate if quantized else candidates.best(tried)
    timings = _timings(chosen, quantized, others)
    metrics: dict[str, tuple[float, float]] = {}
    if data:
        progress("evaluating on the test data")
        metrics = _metrics(data, candidates.open_model(chosen.model, chosen.step, document))
    document = document.model_copy(
        update={
            "precision": request.precision,
            "form": chosen.name,
            "operators": chosen.operators,
            "parity": _parity_figures(chosen, quantized),
            "exactness": chosen.exactness,
            "timings": {
                "unit": "microseconds a run, 1 thread, by batch x time",
                "tf2onnx": beside.operators,
                **timings,
            },
            "samples": samples_of(data, document.labels) if data else (),
            "drawing": layers_of(network),
            "metrics": {**card.get("metrics", {}), **{name: ours for name, (ours, _) in metrics.items()}},
        }
    )
    progress("writing the model and its report")
    files = {MODEL_NAME: candidates.with_document(chosen.model, document)}
    if chosen.step:
        files[STEP_NAME] = candidates.with_document(chosen.step, document)
    warning = compatibility.warning(request.models, request.name, document.signature)
    size = sum(map(len, files.values()))
    results = Results(document, chosen, tried, size, timings, beside.operators, metrics, quantized, warning)
    files[REPORT_NAME] = html.render(results).encode()
    return repository_writer.write(request.models, request.name, request.version, files), results


def _timings(
    chosen: Candidate, quantized: QuantizationResult | None, others: dict[str, dict[str, float | None]]
) -> dict[str, dict[str, float | None]]:
    """Microseconds per run by "batch x time", then by maker: the same measurement as each form's own times."""
    table: dict[str, dict[str, float | None]] = {}
    for shape, ours in chosen.microseconds.items():
        table[shape] = {**others[shape], "ours": ours}
        if quantized:
            table[shape]["float32"] = quantized.float32.microseconds[shape]
    return table


def _test_data(request: ExportRequest, network: StatefulNetwork | SequenceNetwork) -> TestData | None:
    if request.data and isinstance(network, SequenceNetwork):
        raise ExportError(f"--data: a network that cannot be stepped is not scored, leave it out ({network.reason})")
    if request.test_data and isinstance(network, StatefulNetwork):
        return TestData(network, request.test_data)
    if request.precision != "float32":
        raise ExportError(f"{request.precision} needs a network that can be stepped: leave the precision out")
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
    number_layers(model)
    refuse_unservable(model)
    try:
        return StatefulNetwork(model)
    except Unsteppable as reason:
        return SequenceNetwork(model, str(reason))


def _import(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ExportError(f"--import {path}: not a Python file")
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)  # like a script, it may import its neighbours
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except (Exception, SystemExit) as error:
        raise ExportError(f"--import {path}: {type(error).__name__}: {error}") from None
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


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
    task = request.task or card.get("task") or natural_task(network.signature, labels, rollout)
    sample_rate = request.sample_rate or card.get("sample_rate")
    misfit = task_misfit(task, sample_rate, network.signature, labels, rollout)
    if misfit:
        raise ExportError(f"task {task or 'none'}: {misfit}")
    default = request.default_output or card.get("default_output")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions["tensorflow"] = tf.__version__  # of the package `tensorflow`, `tensorflow-cpu` or another
    return ModelDocument(
        name=request.name,
        description=card.get("description", "") if request.description is None else request.description,
        labels=labels,
        rollout=rollout,
        task=task,
        sample_rate=sample_rate,
        signature=network.signature.model_copy(update={"default_output": default} if default else {}),
        exactness=Exactness(proved=False, why="not proved yet"),
        provenance={
            "source": request.network.name,
            "source_sha256": hashlib.sha256(request.network.read_bytes()).hexdigest(),
            "exported": datetime.now(UTC).isoformat(timespec="seconds"),
            **versions,
        },
    )
