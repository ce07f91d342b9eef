"""The usual service: FastAPI, pydantic, ONNX Runtime, and a dict of states."""

from __future__ import annotations

import sys
import uuid

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from bench.peers.lstm import Predictor, Stepper, zero

port, folder = sys.argv[1:]
stepper, predictor = Stepper(f"{folder}/step.onnx"), Predictor(f"{folder}/fused.onnx")
app = FastAPI()


class StepIn(BaseModel):
    x: list[float]


class StepOut(BaseModel):
    session: str
    y: list[float]


class PredictIn(BaseModel):
    sequences: list[list[list[float]]]


class PredictOut(BaseModel):
    outputs: list[list[list[float]]]


@app.post("/sessions", status_code=201)
async def create() -> dict[str, str]:
    session = uuid.uuid4().hex
    stepper.states[session] = zero(), zero()
    return {"session": session}


@app.post("/sessions/{session}/step")
async def step(session: str, body: StepIn) -> StepOut:
    if session not in stepper.states:
        raise HTTPException(404)
    return StepOut(session=session, y=stepper.one(session, body.x).tolist())


@app.post("/predict")
async def predict(body: PredictIn) -> PredictOut:
    return PredictOut(outputs=[y.tolist() for y in predictor.many(body.sequences)])


if __name__ == "__main__":
    uvicorn.run(app, port=int(port), access_log=False, log_level="warning")
