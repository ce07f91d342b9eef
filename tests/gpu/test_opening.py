"""Every model opens on the provider, and what is heavy in it runs there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort

from cellserve.models.signature import MODEL_NAME, STEP_NAME
from cellserve.service.runtime.providers import Provider, providers
from tests.gpu.conftest import Open
from tests.gpu.references import Array, Reference, model_folder
from tests.gpu.report import Report

# What takes the time of a run, under the names that ONNX Runtime gives it when it has optimised a graph.
HEAVY = ("LSTM", "GRU", "RNN", "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "GemmFloat8", "Conv", "FusedConv")
ROWS, STEPS = 4, 3


def test_a_model_opens_and_its_products_run_on_the_provider(
    name: str,
    folder: Path,
    provider: Provider,
    execution_provider: str,
    opened: Open,
    reference: Reference,
    report: Report,
    tmp_path: Path,
) -> None:
    runtime = opened(name, provider)
    assert runtime.provider == execution_provider
    x, states = reference.x[:ROWS, :STEPS], [state[:ROWS] for state in reference.states]
    y, final = runtime.run(np.ascontiguousarray(x), np.full(len(x), STEPS, np.int32), states)
    assert all(np.isfinite(array).all() for array in (y, *final))
    for file in (MODEL_NAME, STEP_NAME):
        path = model_folder(folder, name) / file
        if path.exists():
            length = 1 if file == STEP_NAME else STEPS
            nodes = placement(path, provider, runtime.signature.lengths, x[:, :length], states, tmp_path)
            here = {node: told for node, told in nodes.items() if told[1] == execution_provider}
            heavy = {node for node, (operator, _) in nodes.items() if operator in HEAVY}
            elsewhere = Counter(operator for node, (operator, _) in nodes.items() if node not in here)
            report.row(
                "Where nodes run",
                {
                    "model": f"{name}/{file}",
                    "nodes": len(nodes),
                    "on the provider": len(here),
                    "products": len(heavy),
                    "products on the provider": len(heavy & here.keys()),
                    "copies": sum(operator.startswith("Memcpy") for operator, _ in nodes.values()),
                    "elsewhere": ", ".join(f"{count} {operator}" for operator, count in elsewhere.most_common()),
                },
            )
            assert heavy, f"no operator of {path} is known to be heavy, of {sorted(set(nodes.values()))}"
            assert heavy & here.keys(), f"all products of {path} run elsewhere than on {execution_provider}"


def placement(
    path: Path, provider: Provider, lengths: str | None, x: Array, states: list[Array], scratch: Path
) -> dict[str, tuple[str, str]]:
    """Runs a graph once and gives each node's operator and provider, of graphs within it too, by the node's name."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.enable_profiling = True
    settings.profile_file_prefix = str(scratch / path.name)
    session = ort.InferenceSession(str(path), settings, providers=providers(provider))
    first, *others = [tensor.name for tensor in session.get_inputs() if tensor.name != lengths]
    fed = {first: np.ascontiguousarray(x), **dict(zip(others, states, strict=True))}
    if lengths in {tensor.name for tensor in session.get_inputs()}:
        fed[str(lengths)] = np.full(len(x), x.shape[1], np.int32)
    session.run(None, fed)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = {}
    for event in events:
        told = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["name"].removesuffix("_kernel_time")] = told["op_name"], told["provider"]
    return nodes
