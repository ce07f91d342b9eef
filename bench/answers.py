"""Checks that all servers give the same answers, before anything is timed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save
from websockets.sync.client import ClientConnection, connect

from bench.dialects import DIALECTS, FEATURES, OUTPUTS, Array, ask, request
from bench.peers.lstm import load as open_graph
from bench.servers import Server
from bench.workloads import SAFETENSORS, numbers

TOLERANCE = 1e-4
LENGTHS = [30, 7, 1, 64, 12, 200, 33, 30, 9, 18, 77, 25, 40, 30, 11, 50]


class DifferentAnswers(RuntimeError):
    """Two servers gave different answers to the same request."""


def compare(ours: Server, others: Iterable[Server]) -> None:
    """Sends all servers the same sequences, one and sixteen per request, and the steps of one sequence.

    Raises:
        DifferentAnswers: An answer differs from what Cellserve answers to `/predict` in JSON.
    """
    sequences = [numbers(length, FEATURES) for length in LENGTHS]
    lengths = LENGTHS
    wanted = DIALECTS[ours.name].outputs(ask(ours.port, DIALECTS[ours.name].predict(sequences)), lengths)
    for server in (ours, *others):
        dialect = DIALECTS[server.name]
        got = dialect.outputs(ask(server.port, dialect.predict(sequences)), lengths)
        for sequence, given, want in zip(sequences, got, wanted, strict=True):
            _check(f"{server.name}, 16 sequences per request", given, want)
            (alone,) = dialect.outputs(ask(server.port, dialect.predict([sequence])), [len(sequence)])
            _check(f"{server.name}, one sequence per request", alone, want)
        session = dialect.session(server.port)
        y = [dialect.y(ask(server.port, dialect.step(session, x, k == 0))) for k, x in enumerate(sequences[0])]
        _check(f"{server.name}, steps", np.stack(y), wanted[0])

    flat = np.concatenate([np.array(sequence, np.float32) for sequence in sequences])
    body = save({"x": flat, "lengths": np.array(lengths, np.int32)})
    answer = load(ask(ours.port, request("/predict?outputs=all", body, SAFETENSORS)))
    _check("cellserve, safetensors", np.asarray(answer["y"], np.float32), np.concatenate(wanted))
    with connect(f"ws://127.0.0.1:{ours.port}/stream") as socket:
        handles = [_open(socket) for _ in range(2)]
        for one, want in zip(sequences[0], wanted[0], strict=True):
            socket.send(json.dumps({"op": "step", "session": handles[0], "x": one}))
            _check("cellserve, WebSocket", np.array(json.loads(socket.recv())["y"], np.float32), want)
            _check("cellserve, binary frames", _step_in_a_frame(socket, handles[1], one), want)


def compare_with_operators(server: Server, path: Path) -> None:
    """Steps a session in binary frames, and runs the graph of `bench.export_times` over the same time steps.

    Raises:
        DifferentAnswers: The answers differ.
    """
    x = np.array(numbers(LENGTHS[0], FEATURES), np.float32)
    with connect(f"ws://127.0.0.1:{server.port}/stream") as socket:
        handle = _open(socket)
        y = [_step_in_a_frame(socket, handle, one) for one in x.tolist()]
    graph = open_graph(str(path))
    zeros = {state.name: np.zeros((1, 1, state.shape[2]), np.float32) for state in graph.get_inputs()[1:]}
    _check("large, binary frames", np.stack(y), graph.run(["y"], {"x": x[:, None], **zeros})[0][:, 0])


def _open(socket: ClientConnection) -> int:
    socket.send('{"op":"open"}')
    return int(json.loads(socket.recv())["handle"])


def _step_in_a_frame(socket: ClientConnection, handle: int, x: list[float]) -> Array:
    socket.send(struct.pack(f"<5I{FEATURES}f", 1, 0, 1, 1, handle, *x))
    answer = socket.recv()
    assert isinstance(answer, bytes)
    return np.frombuffer(answer, "<f4", OUTPUTS, 16 + 12)


def _check(who: str, given: Array, wanted: Array) -> None:
    if given.shape != wanted.shape:
        raise DifferentAnswers(f"{who}: the answer has the shape {given.shape}, but Cellserve's has {wanted.shape}")
    if not np.allclose(given, wanted, rtol=0, atol=TOLERANCE):
        raise DifferentAnswers(f"{who}: differs from Cellserve by {np.abs(given - wanted).max():.2g}")
