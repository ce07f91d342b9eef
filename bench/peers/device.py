"""Bare ONNX Runtime, and PyTorch's LSTM, in a loop on a device: prints time steps per second by what was tried.

usage: python -m bench.peers.device MODEL.onnx SESSIONS cuda|cpu SECONDS
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PROVIDERS = {"cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu": ["CPUExecutionProvider"]}
FEATURES, OUTPUTS = 16, 4
GIVEN = ("x", "lengths")  # the inputs that are no states


def calls_per_s(call: Callable[[], object], seconds: float) -> float:
    """Returns calls per second, after a few that do not count."""
    for _ in range(3):
        call()
    calls, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds or not calls:
        call()
        calls += 1
    return calls / taken


def copied(session: ort.InferenceSession, x: np.ndarray) -> Callable[[], object]:
    """States go up with every run and come down again, as most people write it."""
    names = [tensor.name for tensor in session.get_inputs()]
    outputs = [tensor.name for tensor in session.get_outputs()]
    states = {name: _zeros(session, name, len(x)) for name in names if name not in GIVEN}
    fixed = {"x": x, "lengths": np.ones(len(x), np.int32)}

    def step() -> None:
        results = dict(zip(outputs, session.run(None, {**fixed, **states}), strict=True))
        for name in states:
            states[name] = results[f"{name}.next"]

    return step


def bound(session: ort.InferenceSession, x: np.ndarray, device: str) -> Callable[[], object]:
    """States stay on the device, in two sets of buffers that take turns: no session can join or leave."""
    names = [tensor.name for tensor in session.get_inputs() if tensor.name not in GIVEN]
    on_device = ort.OrtValue.ortvalue_from_numpy
    buffers = [{name: on_device(_zeros(session, name, len(x)), device, 0) for name in names} for _ in range(2)]
    lengths, binding, turn = np.ones(len(x), np.int32), session.io_binding(), 0
    output = next(tensor.name for tensor in session.get_outputs() if not tensor.name.endswith(".next"))

    def step() -> None:
        nonlocal turn
        before, after = buffers[turn], buffers[1 - turn]
        turn = 1 - turn
        binding.bind_cpu_input("x", x)
        binding.bind_cpu_input("lengths", lengths)
        binding.bind_output(output, "cpu")
        for name in names:
            binding.bind_ortvalue_input(name, before[name])
            binding.bind_ortvalue_output(f"{name}.next", after[name])
        session.run_with_iobinding(binding)

    return step


def pytorch(units: int, x: np.ndarray, device: str) -> Callable[[], object]:
    """PyTorch's LSTM with a linear layer; x goes up, y comes down, states stay."""
    torch: Any = importlib.import_module("torch")
    lstm = torch.nn.LSTM(FEATURES, units, batch_first=True).to(device)
    out = torch.nn.Linear(units, OUTPUTS).to(device)
    states = tuple(torch.zeros(1, len(x), units, device=device) for _ in range(2))

    def step() -> None:
        nonlocal states
        with torch.inference_mode():
            y, states = lstm(torch.from_numpy(x).to(device), states)
            out(y).cpu().numpy()

    return step


def _zeros(session: ort.InferenceSession, name: str, rows: int) -> np.ndarray:
    shape = next(tensor.shape[1:] for tensor in session.get_inputs() if tensor.name == name)
    return np.zeros((rows, *shape), np.float32)


def main(path: str, sessions: int, device: str, seconds: float) -> dict[str, float | str]:
    """Measures; a text says why something was not."""
    if device == "cuda":
        ort.preload_dlls()
    options = {"use_tf32": "0"} if device == "cuda" else {}
    session = ort.InferenceSession(
        path, providers=PROVIDERS[device], provider_options=[options, {}][: len(PROVIDERS[device])]
    )
    if session.get_providers()[0] != PROVIDERS[device][0]:
        raise RuntimeError(f"ONNX Runtime cannot open the model on {device}")
    x = np.random.default_rng(0).normal(size=(sessions, 1, FEATURES)).astype(np.float32)
    units = int(Path(path).parent.parent.name.rpartition("-")[2])
    results: dict[str, float | str] = {
        f"bare ONNX Runtime, {device}, states copied": calls_per_s(copied(session, x), seconds) * sessions,
        f"bare ONNX Runtime, {device}, states bound": calls_per_s(bound(session, x, device), seconds) * sessions,
    }
    try:
        results[f"PyTorch, {device}"] = calls_per_s(pytorch(units, x, device), seconds) * sessions
    except ImportError:
        results[f"PyTorch, {device}"] = "PyTorch is not installed"
    return results


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))))
