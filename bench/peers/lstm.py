"""What all peers on ONNX Runtime share: opening a model, the dict of states, padding.

It imports NumPy and ONNX Runtime only, since Triton's models get a copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

UNITS, FEATURES = 128, 16


def load(path: str) -> ort.InferenceSession:
    """Opens a model for one core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # As in Cellserve: otherwise a decaying state becomes slow.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def zero() -> np.ndarray:
    return np.zeros((1, UNITS), np.float32)


class Stepper:
    """Steps sessions with `step.onnx`, which has one Gemm for all gates, and keeps their states by id."""

    def __init__(self, path: str) -> None:
        self.model = load(path)
        self.states: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def one(self, session: Any, x: Any) -> np.ndarray:
        """Steps one session by x `[features]`; returns y `[outputs]`."""
        h, c = self.states.get(session) or (zero(), zero())
        y, h, c = self.model.run(None, {"x": np.asarray([x], np.float32), "h": h, "c": c})
        self.states[session] = h, c
        return np.asarray(y[0])

    def many(self, sessions: list[Any], xs: list[Any]) -> list[Any]:
        """Steps a batch of sessions; one that occurs twice is stepped in order, in a second round."""
        if len(sessions) == 1:
            return [self.one(sessions[0], xs[0])]
        out: list[Any] = [None] * len(sessions)
        todo = list(range(len(sessions)))
        while todo:
            seen: set[Any] = set()
            now: list[int] = []
            later: list[int] = []
            for place in todo:
                (later if sessions[place] in seen else now).append(place)
                seen.add(sessions[place])
            held = [self.states.get(sessions[place]) or (zero(), zero()) for place in now]
            feed = {
                "x": np.asarray([xs[place] for place in now], np.float32),
                "h": np.concatenate([h for h, _ in held]),
                "c": np.concatenate([c for _, c in held]),
            }
            y, h, c = self.model.run(None, feed)
            for row, place in enumerate(now):
                self.states[sessions[place]] = h[row : row + 1], c[row : row + 1]
                out[place] = y[row]
            todo = later
        return out


class Predictor:
    """Runs whole sequences, padded to one batch, with `fused.onnx`, which has the `LSTM` operator."""

    def __init__(self, path: str) -> None:
        self.model = load(path)

    def many(self, sequences: list[Any]) -> list[np.ndarray]:
        """Returns the outputs `[time, outputs]` of sequences `[time, features]`."""
        arrays = [np.asarray(sequence, np.float32) for sequence in sequences]
        lengths = np.array([len(array) for array in arrays], np.int32)
        if len(arrays) == 1:
            x = arrays[0][None]
        else:
            x = np.zeros((len(arrays), lengths.max(), FEATURES), np.float32)
            for row, array in enumerate(arrays):
                x[row, : len(array)] = array
        state = np.zeros((len(arrays), UNITS), np.float32)
        (y,) = self.model.run(["y"], {"x": x, "lens": lengths, "h": state, "c": state})
        return [y[row, :length] for row, length in enumerate(lengths)]
