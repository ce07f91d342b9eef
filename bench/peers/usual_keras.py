"""The usual service with Keras instead of ONNX Runtime."""

from __future__ import annotations

import sys
import uuid
from typing import Any

from cellserve.models.tensorflow_import import import_tensorflow

import_tensorflow()
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, HTTPException  # noqa: E402
from pydantic import BaseModel  # noqa: E402

port, folder = sys.argv[1:]
network = keras.saving.load_model(f"{folder}/bench.keras", compile=False)
recurrent, head = network.layers[-2:]
UNITS = 128

app = FastAPI()
sessions: dict[str, list[Any]] = {}


class StepIn(BaseModel):
    x: list[float]


class StepOut(BaseModel):
    session: str
    y: list[float]


class PredictIn(BaseModel):
    sequences: list[list[list[float]]]


class PredictOut(BaseModel):
    outputs: list[list[list[float]]]


@tf.function(reduce_retracing=True)
def one(x: Any, states: Any) -> Any:
    y, states = recurrent.cell(x, states)
    return head(y), states


@tf.function(reduce_retracing=True)
def whole(x: Any, mask: Any) -> Any:
    return head(recurrent(x, mask=mask))


@app.post("/sessions", status_code=201)
async def create() -> dict[str, str]:
    session = uuid.uuid4().hex
    sessions[session] = [tf.zeros((1, UNITS)), tf.zeros((1, UNITS))]
    return {"session": session}


@app.post("/sessions/{session}/step")
async def step(session: str, body: StepIn) -> StepOut:
    if session not in sessions:
        raise HTTPException(404)
    y, sessions[session] = one(tf.constant([body.x]), sessions[session])
    return StepOut(session=session, y=y[0].numpy().tolist())


@app.post("/predict")
async def predict(body: PredictIn) -> PredictOut:
    lengths = np.array([len(sequence) for sequence in body.sequences])
    x = np.zeros((len(lengths), lengths.max(), 16), np.float32)
    for row, sequence in enumerate(body.sequences):
        x[row, : lengths[row]] = sequence
    y = whole(tf.constant(x), tf.constant(np.arange(x.shape[1]) < lengths[:, None])).numpy()
    return PredictOut(outputs=[y[row, :length].tolist() for row, length in enumerate(lengths)])


if __name__ == "__main__":
    uvicorn.run(app, port=int(port), access_log=False, log_level="warning")
