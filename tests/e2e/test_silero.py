"""Silero VAD, a model made with PyTorch, adopted and streamed, against a plain loop over ONNX Runtime."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from tests.server import Server, start_server
from tests.silero import CHUNK, in_a_plain_loop, silero, speech


@pytest.fixture(scope="module")
def spoken() -> tuple[np.ndarray, np.ndarray]:
    """Five speakers, `[speaker, chunk, 512]`, and what the plain loop says of each, `[speaker, chunk, 1]`."""
    voices = np.array([speech(seed)[: 90 * CHUNK] for seed in range(5)])
    return voices.reshape(5, 90, CHUNK), np.array([in_a_plain_loop(voice) for voice in voices])


@pytest.fixture(scope="module")
def server(vad: Path) -> Iterator[Server]:
    server = start_server("--models", str(vad))
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
        # ONNX Runtime crashes, or fails to run it, by what happens to lie behind its memory.
        (["sr=16000"], "with sr=16000: if axis 1 of input is not time, fix its size with --dim input.1=SIZE"),
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
