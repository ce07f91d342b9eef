"""Mosec: a Rust front end with dynamic batching before one Python worker that holds a dict of states."""

from __future__ import annotations

import os
import sys
import uuid
from typing import Any

import numpy as np
import onnxruntime as ort
from mosec import Server, Worker

BATCH = 16  # with no wait: what suited it best of 8, 16, 32 and 64
UNITS = 128


class Steps(Worker):
    def __init__(self) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.environ["BENCH_MODEL"]
        self.model = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.states = [i.name for i in self.model.get_inputs() if i.name not in ("x", "lengths")]
        self.sessions: dict[str, tuple[int, list[np.ndarray]]] = {}

    def run(self, x: np.ndarray, lengths: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
        return self.model.run(None, {"x": x, "lengths": lengths, **dict(zip(self.states, states, strict=True))})

    def forward(self, data: list[Any]) -> list[Any]:
        answers: list[Any] = [None] * len(data)
        steps = []
        for place, item in enumerate(data):
            if "x" in item:
                steps.append(place)
            else:
                session = uuid.uuid4().hex
                self.sessions[session] = (0, [np.zeros(UNITS, np.float32) for _ in self.states])
                answers[place] = {"session": session}
        if steps:
            held = [self.sessions[data[place]["session"]] for place in steps]
            x = np.array([[data[place]["x"]] for place in steps], np.float32)
            states = [np.stack([own[i] for _, own in held]) for i in range(len(self.states))]
            y, *states = self.run(x, np.ones(len(steps), np.int32), states)
            for row, place in enumerate(steps):
                session, position = data[place]["session"], held[row][0] + 1
                self.sessions[session] = (position, [state[row] for state in states])
                answers[place] = {"session": session, "position": position, "y": y[row, 0].tolist()}
        return answers


class Predict(Steps):
    def forward(self, data: list[Any]) -> list[Any]:
        sequences = [sequence for item in data for sequence in item["sequences"]]
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        x = np.zeros((len(lengths), lengths.max(), 16), np.float32)
        for row, sequence in enumerate(sequences):
            x[row, : lengths[row]] = sequence
        y = self.run(x, lengths, [np.zeros((len(x), UNITS), np.float32) for _ in self.states])[0]
        outputs = iter([y[row, length - 1].tolist() for row, length in enumerate(lengths)])
        return [{"outputs": [next(outputs) for _ in item["sequences"]]} for item in data]


if __name__ == "__main__":
    port, path = sys.argv[1:]
    os.environ["BENCH_MODEL"] = path
    sys.argv[1:] = ["--port", port, "--log-level", "error"]
    server = Server()
    server.append_worker(Steps, max_batch_size=BATCH, route="/step")
    server.append_worker(Predict, max_batch_size=BATCH, route="/predict")
    server.run()
