"""Triton's model for whole sequences, `model.py` in its repository."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from lstm import Predictor


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.model = Predictor(f"{os.environ['BENCH_FOLDER']}/fused.onnx")

    def execute(self, requests: list[Any]) -> list[Any]:
        sequences: list[np.ndarray] = []
        counts = []
        for request in requests:
            x, lengths = (pb.get_input_tensor_by_name(request, name).as_numpy()[0] for name in ("x", "lengths"))
            sequences += np.split(x, np.cumsum(lengths)[:-1])
            counts.append(len(lengths))
        outputs = iter(self.model.many(sequences))
        answers = [np.concatenate([next(outputs) for _ in range(count)]) for count in counts]
        return [pb.InferenceResponse([pb.Tensor("y", y[None])]) for y in answers]
