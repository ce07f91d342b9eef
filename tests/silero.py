"""Silero VAD, a model made with PyTorch: its file, its adoption, and a plain loop over ONNX Runtime to compare with.

The loop does what `OnnxWrapper` in the package's utils_vad.py does: it carries the state, and puts the last 64 samples
before the next 512.
"""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime as ort

RATE, CHUNK, CONTEXT = 16000, 512, 64


def silero() -> Path:
    """The file in the package, which is installed without what it depends on, and never imported."""
    found = importlib.util.find_spec("silero_vad")
    assert found is not None and found.origin, "silero-vad is missing: `make test` installs its files"
    return Path(found.origin).parent / "data" / "silero_vad.onnx"


def speech(seed: int, seconds: float = 3.0) -> np.ndarray:
    """Something like speech: pulses of a voice through three formants that move, syllable by syllable, with pauses."""
    rng = np.random.default_rng(seed)
    times = np.arange(int(seconds * RATE)) / RATE
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * times + seed) + rng.normal(0, 1)
    pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0.0) + rng.normal(0, 0.01, len(times))
    signal = np.zeros(len(times))
    for low, high, width in ((300, 800, 80), (900, 2200, 120), (2300, 2900, 180)):
        centre = low + (high - low) * (0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1.5, 3) * times + rng.uniform(0, 6)))
        radius = np.exp(-np.pi * width / RATE)
        one = two = 0.0
        for n, (pulse, turn) in enumerate(zip(pulses, 2 * radius * np.cos(2 * np.pi * centre / RATE), strict=True)):
            one, two = pulse + turn * one - radius**2 * two, one
            signal[n] += one
    loud = np.clip(np.sin(2 * np.pi * 3.3 * times), 0, 1) * (np.sin(2 * np.pi * 0.4 * times + 1) > -0.3)
    return np.asarray(0.3 * signal * loud / np.abs(signal).max(), np.float32)


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples from -1 to 1 as a WAV file of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def in_a_plain_loop(samples: np.ndarray) -> np.ndarray:
    """What users of the package do today: one probability a chunk."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = ort.InferenceSession(str(silero()), settings)
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, CONTEXT), np.float32)
    probabilities = []
    for chunk in samples.reshape(-1, 1, CHUNK):
        x = np.concatenate([context, chunk], axis=1)
        output, state = session.run(None, {"input": x, "state": state, "sr": np.array(RATE, np.int64)})
        context = x[:, -CONTEXT:]
        probabilities.append(output[0])
    return np.array(probabilities)


def adopt(folder: Path) -> Path:
    """Adopts the model as `vad` into a new repository, as docs/how-to/page.md shows it; returns the repository."""
    flags = ["--constant", "sr=16000", "--dim", "input.1=576", "--context", "input=64"]
    task = ["--task", "audio", "--sample-rate", "16000", "--models", str(folder)]
    command = [sys.executable, "-m", "cellserve.cli", "adopt", str(silero()), "--name", "vad", *flags, *task]
    adopted = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert adopted.returncode == 0, adopted.stderr
    return folder
