"""Further versions of exported models: the same graph with other weights, written as the export writes them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cellserve.export.publish import repository_writer
from cellserve.models.signature import MODEL_NAME


def copy_of(repository: Path, folder: Path, *names: str) -> Path:
    """Copies some models into a repository of one's own."""
    for name in names:
        shutil.copytree(repository / name, folder / "models" / name)
    return folder / "models"


def changed(model: Path, change: Callable[[onnx.ModelProto], None]) -> bytes:
    """Gives a model file with something changed in it."""
    proto = onnx.load_model(model)
    change(proto)
    return bytes(proto.SerializeToString())


def scaled(model: Path, factor: float) -> bytes:
    """Gives a model file with all its weights scaled."""

    def scale(proto: onnx.ModelProto) -> None:
        for tensor in _tensors(proto.graph):
            weights = numpy_helper.to_array(tensor)
            if weights.dtype == np.float32 and weights.size > 1:
                tensor.CopyFrom(numpy_helper.from_array(weights * np.float32(factor), tensor.name))

    return changed(model, scale)


def crashing(model: Path) -> bytes:
    """Gives a model file that ends the process which opens it: ONNX Runtime folds the constant -2**63 / -1 (SIGFPE)."""

    def crash(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        for name, value in (("smallest", -(2**63)), ("minus_one", -1), ("nothing", 0)):
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
        y = graph.output[0].name
        last = next(node for node in graph.node if y in node.output)
        last.output[list(last.output).index(y)] = "unchanged"
        for operator, inputs, output, more in (
            ("Div", ["smallest", "minus_one"], "quotient", {}),
            ("Mul", ["quotient", "nothing"], "zero", {}),
            ("Cast", ["zero"], "float_zero", {"to": onnx.TensorProto.FLOAT}),
            ("Add", ["unchanged", "float_zero"], y, {}),
        ):
            graph.node.append(helper.make_node(operator, inputs, [output], **more))

    return changed(model, crash)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def add_version(models: Path, name: str, version: int, content: bytes | None = None) -> str:
    """Writes a version at once, of other weights than the first where nothing is given; gives its digest."""
    if content is None:
        content = scaled(models / name / "1" / MODEL_NAME, 1 + version / 16)
    repository_writer.write(models, name, version, {MODEL_NAME: content})
    return hashlib.sha256(content).hexdigest()


def remove_version(models: Path, name: str, version: int) -> None:
    """Takes a version out of the repository at once."""
    gone = models.parent / f"gone-{name}-{version}"
    (models / name / str(version)).rename(gone)
    shutil.rmtree(gone)
