"""Silero VAD, a model made with PyTorch, adopted and streamed, against a plain loop over ONNX Runtime.

The loop does what `OnnxWrapper` in the package's utils_vad.py does: it carries the state, and puts the last 64 samples
before the next 512.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from websockets.sync.client import connect

from tests.server import Server, start_server

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


@pytest.fixture(scope="module")
def spoken() -> tuple[np.ndarray, np.ndarray]:
    """Five speakers, `[speaker, chunk, 512]`, and what the plain loop says of each, `[speaker, chunk, 1]`."""
    voices = np.array([speech(seed)[: 90 * CHUNK] for seed in range(5)])
    return voices.reshape(5, 90, CHUNK), np.array([in_a_plain_loop(voice) for voice in voices])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    artifacts = tmp_path_factory.mktemp("silero")
    flags = ["--constant", "sr=16000", "--dim", "input.1=576", "--context", "input=64", "--models", str(artifacts)]
    command = [sys.executable, "-m", "cellserve.cli", "adopt", str(silero()), "--name", "vad", *flags]
    adopted = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert adopted.returncode == 0, adopted.stderr
    server = start_server("--models", str(artifacts))
    yield server
    assert server.stop() == 0


def test_the_loop_hears_speech_in_it(spoken: tuple[np.ndarray, np.ndarray]) -> None:
    assert spoken[1].max() > 0.5
    assert spoken[1].min() < 0.1


def test_speakers_streamed_together_are_what_the_plain_loop_gives(
    server: Server, spoken: tuple[np.ndarray, np.ndarray]
) -> None:
    voices, wanted = spoken
    with connect(server.url.replace("http", "ws") + "/stream", max_size=None) as stream:
        for _ in voices:
            stream.send(json.dumps({"op": "open", "model": "vad"}))
            stream.recv(timeout=30)
        handles = np.arange(5, dtype="<u4").tobytes()
        heard = []
        for chunk in range(voices.shape[1]):
            x = np.ascontiguousarray(voices[:, chunk : chunk + 1])
            stream.send(struct.pack("<4I", 1, chunk, 5, 1) + handles + x.tobytes())
            answer = stream.recv(timeout=30)
            assert isinstance(answer, bytes)
            heard.append(np.frombuffer(answer, "<f4", offset=16 + 12 * 5))
    np.testing.assert_allclose(np.array(heard).T[:, :, None], wanted, atol=1e-5)


def test_any_chunks_over_http_give_the_bits_of_one_prediction(
    server: Server, spoken: tuple[np.ndarray, np.ndarray]
) -> None:
    voices, wanted = spoken
    with server.client() as client:
        assert client.get("/models/vad").json()["exact"] is True
        body: dict[str, Any] = {"model": "vad", "sequences": voices[:3].tolist(), "return_states": True}
        whole = client.post("/predict", json=body).json()["outputs"]
        np.testing.assert_allclose(whole, wanted[:3], atol=1e-5)
        session = client.post("/sessions", json={"model": "vad"}).json()["session"]
        stepped = []
        for start, stop in ((0, 1), (1, 2), (2, 40), (40, 90)):
            x = voices[0, start:stop].tolist()
            answer = client.post(f"/sessions/{session}/step", json={"x": x, "position": start}).json()
            stepped += answer["y"]
        assert stepped == whole[0]


def test_a_chunk_of_another_length_is_refused_with_the_length(server: Server) -> None:
    with server.client() as client:
        session = client.post("/sessions", json={"model": "vad"}).json()["session"]
        answer = client.post(f"/sessions/{session}/step", json={"x": [0.0] * 576})
    assert answer.status_code == 422
    assert "576 numbers where the model takes 512" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["sr=16000"],
            "ONNX Runtime crashed (SIGSEGV) while it opened the graph with sr=16000: if axis 1 of input is not time, "
            "fix its size with --dim input.1=SIZE",
        ),
        (["sr=44100", "--dim", "input.1=576"], "with sr=44100: is the graph made for this value?"),
    ],
)
def test_a_graph_that_crashes_onnx_runtime_is_refused_in_one_line(tmp_path: Path, flags: list[str], told: str) -> None:
    command = [sys.executable, "-m", "cellserve.cli", "adopt", str(silero()), "--name", "vad"]
    adopted = subprocess.run(
        [*command, "--models", str(tmp_path), "--constant", *flags], capture_output=True, text=True, timeout=120
    )
    assert adopted.returncode == 1
    assert told in adopted.stderr
    assert adopted.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
