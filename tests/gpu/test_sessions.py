"""The promise on the provider: sessions stepped in chunks, among others, give the bits of one run over the whole."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cellserve import Client
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.providers import Provider
from tests.gpu.conftest import Open
from tests.gpu.references import Array, Reference
from tests.gpu.report import Report
from tests.server import Server

SESSIONS, STEPS, THREADS = 12, 90, 6
SIZES = (1, 1, 1, 2, 5, 20, 40)


def test_sessions_stepped_in_chunks_among_others_give_the_bits_of_one_run(
    name: str, folder: Path, provider: Provider, server: Server, opened: Open, reference: Reference, report: Report
) -> None:
    signature = opened(name, provider).signature
    x, states = random_inputs(signature, SESSIONS, STEPS, np.random.default_rng(6))
    called = [spec.name for spec in signature.states]
    begun = [dict(zip(called, (state[row] for state in states), strict=True)) for row in range(SESSIONS)]

    def stepped(row: int) -> tuple[Array, dict[str, Array]]:
        """One session's outputs and last state, in chunks of its own."""
        sizes = random.Random(row)
        with Client(server.url) as client, client.session(name, begun[row]) as session:
            ys, start = [], 0
            while start < STEPS:
                end = min(start + sizes.choice(SIZES), STEPS)
                if end == start + 1:
                    ys.append(np.asarray(session.step(x[row, start]))[None])
                else:
                    ys.append(np.asarray(session.step(x[row, start:end], outputs="all")))
                start = end
            return np.concatenate(ys), dict(session.state())

    with Client(server.url) as client:
        whole = client.predict(name, x[0], outputs="all", states=begun[0], return_states=True)  # alone
        with traffic(server, folder, name, x), ThreadPoolExecutor(THREADS) as pool:
            sessions = list(pool.map(stepped, range(SESSIONS)))
            together = client.predict(name, [*x], outputs="all", states=begun, return_states=True)
        exact = client.model(name)["exact"]
    assert whole.states is not None and together.states is not None
    same(sessions[0], (whole.y, whole.states))
    for row, session in enumerate(sessions):
        same(session, (together.y[row], together.states[row]))
    if exact:  # then one run of ONNX Runtime over all of it, without the service, gives them too
        y, final = opened(name, provider).run(x, np.full(SESSIONS, STEPS, np.int32), states)
        for row, session in enumerate(sessions):
            same(session, (y[row], dict(zip(called, (state[row] for state in final), strict=True))))
    report.row(
        "Sessions among others",
        {"model": name, "exact": exact, "sessions": SESSIONS, "steps of each": STEPS, "bits": "those of one run"},
    )


@contextmanager
def traffic(server: Server, folder: Path, name: str, x: Array) -> Iterator[None]:
    """Keeps the model busy with other sequences and sessions for as long as it is entered."""
    over = threading.Event()

    def predict(seed: int) -> None:
        rng = random.Random(seed)
        with Client(server.url) as client:
            while not over.is_set():
                rows = rng.sample(range(len(x)), rng.randint(1, len(x)))
                client.predict(name, [x[row, : rng.randint(1, STEPS)] for row in rows])

    def step(seed: int) -> None:
        rng = random.Random(seed)
        with Client(server.url) as client:
            while not over.is_set():
                with client.session(name) as session:
                    for _ in range(10):
                        session.step(x[rng.randrange(len(x)), : rng.randint(1, 9)])

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(work, seed) for work in (predict, step) for seed in range(2)]
        try:
            yield
        finally:
            over.set()
            for work in running:
                work.result()


def same(ours: tuple[Array, dict[str, Array]], true: tuple[Array, dict[str, Array]]) -> None:
    """Asserts that outputs and states are the same to the bit."""
    assert ours[0].shape == true[0].shape and ours[0].tobytes() == true[0].tobytes()
    assert ours[1].keys() == true[1].keys()
    for name, state in ours[1].items():
        assert state.tobytes() == true[1][name].tobytes(), name
