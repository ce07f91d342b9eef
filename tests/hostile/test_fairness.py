"""Fairness: the work of one client does not keep another's waiting, and takes no place of theirs."""

from __future__ import annotations

import gzip
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from tests.e2e.helpers import create, is_busy, problem_kind
from tests.helpers import until
from tests.hostile.conftest import Beside
from tests.server import Serve, Server

pytestmark = pytest.mark.long

GZIP = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
JSON = {"Content-Type": "application/json"}


def steps(count: int) -> bytes:
    return b'{"outputs":"last","x":[' + b"[1]," * (count - 1) + b"[1]]}"


def test_one_request_does_not_fill_the_queue(server: Server, beside: Beside) -> None:
    x = np.ones((1, 4_000_000, 1), np.float32)
    with server.client() as client, beside(server, "one request that fills the queue"):
        headers = {"Content-Type": "application/x-safetensors"}
        answer = client.post("/predict?model=sunspots&outputs=last", content=save({"x": x}), headers=headers)
        assert (answer.status_code, problem_kind(answer)) == (413, "body-too-large")
        body = gzip.compress(b'{"x":[' + b"[1]," * 4_000_000 + b"[1]]}")
        answer = client.post(f"/sessions/{create(client, 'sunspots')}/step", content=body, headers=GZIP)
        assert (answer.status_code, problem_kind(answer)) == (413, "body-too-large")
        session = create(client, "sunspots")
        assert client.post(f"/sessions/{session}/step", json={"x": [1]}).json()["position"] == 1


@pytest.mark.parametrize("kind", ["one long sequence", "many sequences"])
def test_a_neighbour_has_its_turn_while_a_client_uses_all_it_may(server: Server, beside: Beside, kind: str) -> None:
    lengths = [200_000] if kind == "one long sequence" else [100] * 2000
    sequences = b",".join(b"[" + b"[1]," * (length - 1) + b"[1]]" for length in lengths)
    body = b'{"model":"sunspots","outputs":"last","sequences":[' + sequences + b"]}"

    def one(_: int) -> int:
        with server.client() as client:
            return client.post("/predict", content=gzip.compress(body), headers=GZIP).status_code

    with beside(server, f"a client that uses all it may: {kind}"), ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(one, range(8)))
    assert 200 in statuses
    assert set(statuses) <= {200, 503}


def test_the_work_of_a_client_that_has_gone_is_dropped_and_nothing_of_it_applied(
    server: Server, beside: Beside
) -> None:
    with server.client() as client, beside(server, "clients that leave"):
        sessions = [create(client, "sunspots") for _ in range(5)]
        begun = time.monotonic()
        for session in sessions:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"/sessions/{session}/step", content=steps(120_000), headers=JSON, timeout=0.1)
        until(lambda: is_busy(client), lambda busy: not busy, seconds=30)
        took = time.monotonic() - begun
        applied = [client.get(f"/sessions/{session}").json()["position"] for session in sessions]
    assert set(applied) <= {0, 120_000}
    assert took < 30


def test_a_client_neither_takes_all_sessions_nor_evicts_those_of_others(
    serve: Serve, examples: Any, beside: Beside
) -> None:
    flags = "--max-sessions", "20", "--max-sessions-per-owner", "10", "--when-full", "evict"
    server = serve("--models", str(examples), *flags)
    with server.client() as client, beside(server, "a client that makes sessions without end"):
        made = [create(client, "sunspots") for _ in range(100)]
        alive = [client.get(f"/sessions/{session}").status_code for session in made]
    assert alive == [410] * 90 + [200] * 10
