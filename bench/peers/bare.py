"""Bare ONNX Runtime in a loop: prints steps per second and CPU seconds per step, for the best model and shape.

usage: python -m bench.peers.bare steps|sequences|large SECONDS MODEL.onnx...
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime as ort

from bench.peers.lstm import load

SHAPES = {  # batch, time
    "steps": [(256, 1)],
    "large": [(64, 1)],
    "sequences": [(batch, 30) for batch in (1, 4, 8, 16, 32, 64)],
}
PROBE = 0.05  # seconds


def feed(model: ort.InferenceSession, batch: int, time: int) -> dict[str, np.ndarray]:
    sizes, made = {"batch": batch, "time": time}, {}
    for tensor in model.get_inputs():
        shape = [sizes.get(size, size) for size in tensor.shape]
        if tensor.name == "x":
            made["x"] = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        elif tensor.type == "tensor(int32)":
            made[tensor.name] = np.full(shape, time, np.int32)
        else:
            made[tensor.name] = np.zeros(shape, np.float32)
    return made


def measured(model: ort.InferenceSession, batch: int, steps: int, seconds: float) -> tuple[float, float]:
    inputs = feed(model, batch, steps)
    model.run(None, inputs)
    runs, cpu, start = 0, time.process_time(), time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        model.run(None, inputs)
        runs += 1
    return runs * batch * steps / taken, (time.process_time() - cpu) / (runs * batch * steps)


if __name__ == "__main__":
    what, seconds, *paths = sys.argv[1:]
    candidates = [(load(path), *shape) for path in paths for shape in SHAPES[what]]
    model, batch, steps = max(candidates, key=lambda one: measured(one[0], one[1], one[2], PROBE)[0])
    per_s, cpu_s = measured(model, batch, steps, float(seconds))
    print(json.dumps({"steps_per_s": per_s, "cpu_s": cpu_s}))
