"""Bare ONNX Runtime in a loop: prints the steps a second at batch 256, and those of sequences at the best batch."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime as ort

BATCHES = (1, 4, 8, 16, 32, 64)
TIME = 30


def rate(model: ort.InferenceSession, batch: int, steps: int, seconds: float) -> float:
    feed = {
        "x": np.random.default_rng(0).normal(size=(batch, steps, 16)).astype(np.float32),
        "lengths": np.full(batch, steps, np.int32),
        **{i.name: np.zeros((batch, 128), np.float32) for i in model.get_inputs() if i.name not in ("x", "lengths")},
    }
    model.run(None, feed)
    runs, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        model.run(None, feed)
        runs += 1
    return runs * batch * steps / taken


if __name__ == "__main__":
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    model = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    seconds = float(sys.argv[2])
    sequences = {batch: rate(model, batch, TIME, seconds / len(BATCHES)) for batch in BATCHES}
    print(json.dumps({"steps": rate(model, 256, 1, seconds), "sequences": max(sequences.values())}))
