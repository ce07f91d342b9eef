"""The usual service: FastAPI, pydantic, ONNX Runtime, and a dict of states.

It runs the model that Cellserve exports, so that the serving alone is compared.
"""

from __future__ import annotations

import sys
import uuid

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

options = ort.SessionOptions()
options.intra_op_num_threads = 1
model = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
STATES = [i.name for i in model.get_inputs() if i.name not in ("x", "lengths")]
UNITS = 128

app = FastAPI()
sessions: dict[str, tuple[int, list[np.ndarray]]] = {}


class StepIn(BaseModel):
    x: list[float]


class StepOut(BaseModel):
    session: str
    position: int
    y: list[float]


class PredictIn(BaseModel):
    sequences: list[list[list[float]]]


class PredictOut(BaseModel):
    outputs: list[list[float]]


def run(x: np.ndarray, lengths: np.ndarray, states: list[np.ndarray]) -> list[np.ndarray]:
    return model.run(None, {"x": x, "lengths": lengths, **dict(zip(STATES, states, strict=True))})


@app.post("/sessions", status_code=201)
async def create() -> dict[str, str]:
    session = uuid.uuid4().hex
    sessions[session] = (0, [np.zeros((1, UNITS), np.float32) for _ in STATES])
    return {"session": session}


@app.post("/sessions/{session}/step")
async def step(session: str, body: StepIn) -> StepOut:
    if session not in sessions:
        raise HTTPException(404)
    position, states = sessions[session]
    y, *states = run(np.array([[body.x]], np.float32), np.ones(1, np.int32), states)
    sessions[session] = (position + 1, states)
    return StepOut(session=session, position=position + 1, y=y[0, 0].tolist())


@app.post("/predict")
async def predict(body: PredictIn) -> PredictOut:
    lengths = np.array([len(sequence) for sequence in body.sequences], np.int32)
    x = np.zeros((len(lengths), lengths.max(), 16), np.float32)
    for row, sequence in enumerate(body.sequences):
        x[row, : lengths[row]] = sequence
    y = run(x, lengths, [np.zeros((len(x), UNITS), np.float32) for _ in STATES])[0]
    return PredictOut(outputs=[y[row, length - 1].tolist() for row, length in enumerate(lengths)])


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="warning")
