"""`python -m bench.shapes`: shapes of runs beside one row, one step, for models that need them to be exact.

For each model the proof at load takes a shape policy, by which ticks run batches. Its twin says of itself that it is
not proved, and runs one row and one step at a time, as all such models did before. Both get binary frames of 64
sessions. Frames of 64 sessions must give the bits of frames of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper
from websockets.sync.client import connect

from bench import load
from bench.device import frame_of
from bench.dialects import ask
from bench.servers import LOAD_CORE, Server, pin
from bench.workloads import SESSIONS, binary_frames
from cellserve.export.publish import repository_writer
from cellserve.models.signature import MODEL_NAME, Signature, StateSpec, TensorSpec
from tests import foreign

OPERATORS = ("Softplus", "Elu", "Selu", "Log", "Sin", "Mish", "RNN")
WIDTHS = (3, 33, 128)
STEPS = 5  # whose outputs are compared
GOAL = 10  # times the steps a second
HEAD = """\
| operator | width | shapes | steps/s | one row, one step | ratio | CPU µs a frame: ours / one by one | ratio of CPU |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def simple_rnn(width: int) -> tuple[Any, Signature]:
    """The operator of Keras's SimpleRNN: `h.next = tanh(x W + h R)`, whose bits differ between one row and several."""
    node = helper.make_node
    made = foreign.model(
        [
            node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
            node("Unsqueeze", ["h", "zero"], ["h0"]),
            node("RNN", ["xt", "W", "R", "", "", "h0"], ["yt", "hn"], hidden_size=width),
            node("Squeeze", ["yt", "one"], ["ys"]),
            node("Transpose", ["ys"], ["y"], perm=[1, 0, 2]),
            node("Squeeze", ["hn", "zero"], ["h.next"]),
        ],
        [("x", 1, ["batch", "time", width]), ("h", 1, ["batch", width])],
        [("y", 1, ["batch", "time", width]), ("h.next", 1, ["batch", width])],
        zero=np.array([0], np.int64),
        one=np.array([1], np.int64),
        W=foreign.weights(1, 1, width, width),
        R=foreign.weights(2, 1, width, width) / np.float32(np.sqrt(width)),
    )
    x, y = (TensorSpec(name=name, shape=(width,)) for name in "xy")
    state = StateSpec(name="h", next_name="h.next", shape=(width,))
    return made, Signature(inputs=(x,), outputs=(y,), states=(state,), lengths=None)


def write_models(folder: Path) -> None:
    """Writes each model and its twin."""
    for operator in OPERATORS:
        for width in WIDTHS:
            made, signature = simple_rnn(width) if operator == "RNN" else foreign.elementwise(operator, width)
            for name, exact in ((f"{operator}-{width}", True), (f"{operator}-{width}-one", False)):
                content = foreign.described(made, signature, exact)
                repository_writer.write(folder, name, None, {MODEL_NAME: content})


def outputs(server: Server, model: str, width: int, together: int) -> list[bytes]:
    """Returns the outputs of 64 new sessions, the same inputs each time, in frames of `together` sessions."""
    x = np.random.default_rng(0).normal(size=(SESSIONS, STEPS, width))
    with connect(f"ws://127.0.0.1:{server.port}/stream", compression=None, max_size=None) as socket:
        handles = []
        for _ in range(SESSIONS):
            socket.send(json.dumps({"op": "open", "model": model}))
            handles.append(json.loads(socket.recv())["handle"])
        ys = []
        for step in range(STEPS):
            for first in range(0, SESSIONS, together):
                rows = slice(first, first + together)
                socket.send(frame_of(handles[rows], x[rows, step : step + 1]))
                answer = socket.recv()
                assert isinstance(answer, bytes), answer
                y = answer[16 + 12 * together :]
                size = len(y) // together
                ys += [y[place * size : (place + 1) * size] for place in range(together)]
        return ys


def rows(server: Server, rounds: int, seconds: float) -> Iterator[tuple[str, float, bool]]:
    """Yields each row of the table, its ratio, and whether the bits are the same."""
    for operator in OPERATORS:
        for width in WIDTHS:
            name = f"{operator}-{width}"
            told = json.loads(ask(server.port, f"GET /models/{name} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()))
            same = outputs(server, name, width, SESSIONS) == outputs(server, name, width, 1)
            ours, single = (binary_frames(server, SESSIONS, one, width) for one in (name, f"{name}-one"))
            pairs = [(ours(seconds), single(seconds)) for _ in range(rounds)]
            ratio = statistics.median(one.value / other.value for one, other in pairs)
            cpu, cpu_one = (statistics.median(pair[place].cpu_us or 0 for pair in pairs) for place in range(2))
            rate, rate_one = (statistics.median(pair[place].value for pair in pairs) for place in range(2))
            shapes = told["shapes"] if told["exact"] else "not exact"
            cells = [operator, str(width), shapes, f"{rate:,.0f}", f"{rate_one:,.0f}", f"{ratio:.1f}",
                     f"{cpu:,.0f} / {cpu_one:,.0f}", f"{cpu_one / cpu:.1f}"]  # fmt: skip
            yield f"| {' | '.join(cells)} |{'' if same else ' other bits!'}", ratio, same


def main() -> int:
    """Runs the command and returns its exit status: 1 if bits differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.shapes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds per measurement (default: 0.5)")
    arguments = parser.parse_args()
    load.build()
    pin(LOAD_CORE)
    with tempfile.TemporaryDirectory(prefix="cellserve-shapes-") as folder:
        write_models(Path(folder))
        serve = "-m", "cellserve.cli", "serve", "--models", folder, "--provider", "cpu", "--port", "{port}"
        server = Server("cellserve", *serve, ready="/readyz")
        try:
            print(HEAD, flush=True)
            ratios, all_same = [], True
            for row, ratio, same in rows(server, arguments.rounds, arguments.seconds):
                print(row, flush=True)
                ratios.append(ratio)
                all_same &= same
        finally:
            server.stop()
    least = min(ratios)
    print(f"\nThe lowest ratio of steps/s is {least:.1f} (goal: {GOAL}); bits: {'the same' if all_same else 'differ'}.")
    return 0 if all_same else 1


if __name__ == "__main__":
    sys.exit(main())
