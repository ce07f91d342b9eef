"""States that stay on the device: the whole life of a session, two processes, restarts, memory, and the driver."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from cellserve import Client
from cellserve.errors import SessionGone
from cellserve.service.engine.device_arena import DeviceArena
from cellserve.service.engine.memory import resident_bytes
from cellserve.service.runtime.batch_invariance import random_inputs
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions
from cellserve.service.runtime.providers import Provider, cuda_answers
from tests.gpu.conftest import Open, start_gpu_server
from tests.gpu.references import Array, Reference, model_folder, names
from tests.gpu.report import Report
from tests.server import Server

STEPS = 40
BURST_BYTES, MOST_ROWS, BATCH = 512 * 2**20, 40_000, 1000


def test_a_session_does_all_that_it_should_with_its_states_on_the_device(
    name: str, server: Server, reference: Reference
) -> None:
    x = reference.x[0, :STEPS]
    with Client(server.url) as client, server.client() as http:
        assert client.model(name)["state_memory"] == "device"
        whole = client.predict(name, x, outputs="all", return_states=True)
        assert isinstance(whole.y, np.ndarray) and whole.states is not None
        with client.session(name) as session:
            assert same(session.step(x[:9], outputs="all"), whole.y[:9])
            kept = session.state()
            with session.fork() as copy:
                assert same(copy.step(x[9:], outputs="all"), whole.y[9:])
            step = {"x": x[9].tolist(), "position": 9}
            path = f"/sessions/{session.id}/step"
            first, again = (http.post(path, json=step) for _ in range(2))
            assert (first.status_code, again.status_code, again.json()["y"]) == (200, 200, first.json()["y"])
            assert http.post(path, json={**step, "position": 3}).status_code == 409
            huge = np.full(x[9].shape, 3e38).tolist()
            refused = http.post(path, json={"x": [huge, huge], "position": 10})
            assert refused.status_code in (200, 422)  # whether it is finite is the model's affair
            session.refresh()
            session.set_state(kept)
            assert same(session.step(x[9:], outputs="all"), whole.y[9:])
            for state, final in whole.states.items():
                assert session.state()[state].tobytes() == final.tobytes()
            session.reset()
            assert same(session.step(x[:9], outputs="all"), whole.y[:9])
            session.delete()
            with pytest.raises(SessionGone):
                session.step(x[0])


def same(ours: object, theirs: Array) -> bool:
    return np.asarray(ours, theirs.dtype).tobytes() == theirs.tobytes()


def test_two_processes_on_one_device_and_a_restart_give_the_same_bits(
    folder: Path, provider: Provider, server: Server, report: Report
) -> None:
    another = start_gpu_server(folder, provider)
    taken = device_bytes(provider, server.process.pid), device_bytes(provider, another.process.pid)

    def predicted(url: str) -> dict[str, bytes]:
        with Client(url) as client:
            found = {}
            for name in names(folder):
                x = Reference.read(folder / f"{name}.npz").x[:, :STEPS]
                found[name] = b"".join(y.tobytes() for y in client.predict(name, [*x], outputs="all").y)
            return found

    with ThreadPoolExecutor(4) as pool:  # both under load at the same time
        first, *others = pool.map(predicted, [server.url, another.url] * 2)
    assert all(one == first for one in others)
    assert another.stop() == 0
    restarted = start_gpu_server(folder, provider)
    assert predicted(restarted.url) == first
    assert restarted.stop() == 0
    report.row("Two processes and a restart", {"models": len(first), "bits": "the same", "MiB each": mib(*taken)})


def test_memory_of_many_sessions_is_given_back(folder: Path, provider: Provider, report: Report) -> None:
    name = max(names(folder), key=lambda one: state_bytes(model_folder(folder, one)))
    options = RuntimeOptions(provider=provider, state_memory="device")
    runtime = Runtime(model_folder(folder, name) / "model.onnx", options)
    assert runtime.on_device is not None
    arena = DeviceArena(runtime.signature.states, MOST_ROWS, runtime.on_device.tables())
    count = min(MOST_ROWS, BURST_BYTES // arena.row_bytes) // BATCH * BATCH
    x, _ = random_inputs(runtime.signature, BATCH, 1, np.random.default_rng(0))
    step(arena, arena.allocate_many(BATCH), x)
    before = device_bytes(provider, os.getpid())
    slots = arena.allocate_many(count - BATCH)
    assert slots is not None
    for some in np.split(slots, len(slots) // BATCH):
        step(arena, some, x)
    full = device_bytes(provider, os.getpid())
    arena.release(slots)
    arena.trim()
    arena.trim()
    after = device_bytes(provider, os.getpid())
    states = count * arena.row_bytes
    report.row(
        "Memory of states",
        {
            "model": name,
            "sessions": count,
            "MiB of states": mib(states),
            "before, full, after": mib(before, full, after),
        },
    )
    assert full - before < 4 * states + 64 * 2**20  # twice for growing, and what a run takes
    if full - before > 16 * 2**20:  # else it is lost in what else a process does
        assert after - before < (full - before) / 2


def state_bytes(folder: Path) -> int:
    return sum(spec.bytes for spec in Runtime(folder / "model.onnx", RuntimeOptions("cpu")).signature.states)


def step(arena: DeviceArena, slots: Array | None, x: Array) -> None:
    assert slots is not None
    batch = arena.gather(slots)
    batch.run(x, np.ones(len(slots), np.int32))
    arena.scatter(slots, batch)
    arena.done(batch)


def test_a_device_that_answers_is_not_taken_for_lost(provider: Provider, opened: Open, folder: Path) -> None:
    gone = Exception("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 719: unspecified launch failure ; GPU=0")
    assert cuda_answers() == (provider == "cuda")
    assert not opened(names(folder)[0], provider).has_lost_device(gone)


def test_a_server_on_the_device_is_ready(server: Server) -> None:
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def device_bytes(provider: Provider, process: int) -> int:
    """Memory that a process has of the GPU; in a rehearsal, this process's resident memory, and 0 of others."""
    if provider == "cpu":
        return resident_bytes() if process == os.getpid() else 0
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    used = dict(line.split(", ") for line in told.strip().splitlines())
    # In a container the driver may tell no process ids that are known here: then what all of them have.
    return int(used.get(str(process), sum(int(size) for size in used.values() if size.isdigit()))) * 2**20


def mib(*sizes: int) -> str:
    return ", ".join(f"{size / 2**20:,.0f}" for size in sizes)
