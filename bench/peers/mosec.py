"""Mosec: a Rust front end with dynamic batching, and one Python worker per route, which holds the states.

It uses orjson in place of Mosec's own JSON, since that is faster.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import orjson
from mosec import Runtime, Server, Worker

from bench.peers.lstm import Predictor, Stepper


class Json(Worker):
    def deserialize(self, data: bytes) -> Any:
        return orjson.loads(data)

    def serialize(self, data: Any) -> bytes:
        return orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY)


class Step(Json):
    def __init__(self) -> None:
        self.model = Stepper(f"{os.environ['BENCH_FOLDER']}/step.onnx")

    def forward(self, data: list[Any]) -> list[Any]:
        return [{"y": y} for y in self.model.many([item["sid"] for item in data], [item["x"] for item in data])]


class Predict(Json):
    def __init__(self) -> None:
        self.model = Predictor(f"{os.environ['BENCH_FOLDER']}/fused.onnx")

    def forward(self, data: list[Any]) -> list[Any]:
        outputs = iter(self.model.many([sequence for item in data for sequence in item["sequences"]]))
        return [{"outputs": [np.ascontiguousarray(next(outputs)) for _ in item["sequences"]]} for item in data]


if __name__ == "__main__":
    port, folder, *limits = sys.argv[1:]
    os.environ["BENCH_FOLDER"] = folder  # the workers are other processes
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--log-level", "error", "--timeout", "60000"]
    server = Server()
    step_batch, step_wait, predict_batch, predict_wait = map(int, limits)
    server.register_runtime(
        {
            "/step": [Runtime(Step, max_batch_size=step_batch, max_wait_time=step_wait)],
            "/predict": [Runtime(Predict, max_batch_size=predict_batch, max_wait_time=predict_wait)],
        }
    )
    server.run()
