"""Triton's model for steps, `model.py` in its repository. It keeps the states by sequence id."""

from __future__ import annotations

import os
from typing import Any

import triton_python_backend_utils as pb
from lstm import Stepper

START = 1  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_START


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.model = Stepper(f"{os.environ['BENCH_FOLDER']}/step.onnx")

    def execute(self, requests: list[Any]) -> list[Any]:
        for request in requests:
            if request.flags() & START:
                self.model.states.pop(request.correlation_id(), None)
        ids = [request.correlation_id() for request in requests]
        xs = [pb.get_input_tensor_by_name(request, "x").as_numpy()[0] for request in requests]
        return [pb.InferenceResponse([pb.Tensor("y", y[None])]) for y in self.model.many(ids, xs)]
