"""The embedded store behind a server with workers: whatever is killed, no step is lost and none is applied twice."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import lmdb
import pytest

from cellserve.service.sessions.stores.lmdb.checkpoint import Checkpoint
from tests.e2e.helpers import create, frames, problem_kind
from tests.e2e.test_replicas import SECONDS, through_chaos
from tests.fork_server import run
from tests.helpers import FEATURES, free_port, until
from tests.server import Serve


class Machine:
    """A server with two workers over one folder, whose processes are killed, and started again on the same port."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.port = free_port()
        flags = "--models", str(repository), "--store", f"lmdb:{folder / 'store'}", "--port", str(self.port)
        self.command = [sys.executable, "-m", "cellserve.cli", "serve", *flags, "--workers", "2"]
        self.command += ["--store-checkpoint-seconds", "1", "--shutdown-seconds", "1"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.start()

    def start(self) -> None:
        """Starts the server; again, while workers of the one before still end and have the port."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def ready(self) -> bool:
        if self.process.poll() is not None:
            self.start()
        return httpx.get(f"{self.url}/readyz", timeout=1).status_code == 200

    def workers(self) -> list[int]:
        """Gives the processes of the workers."""
        # Without `ww` it cuts lines off, before what is looked for.
        listed = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True)
        return [int(line.split()[0]) for line in listed.stdout.decode().splitlines() if "spawn_main" in line]

    def kill(self, what: str, random_: random.Random) -> None:
        if what == "all":
            os.killpg(self.process.pid, signal.SIGKILL)
        elif what == "parent":
            self.process.kill()
        else:
            workers = until(lambda: self.ready() and self.workers())  # not those of a parent that was killed
            os.kill(random_.choice(workers or []), signal.SIGSTOP if what == "stop" else signal.SIGKILL)

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def machine(repository: Path, tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(repository, tmp_path)
    until(machine.ready)
    yield machine
    machine.end()


def survives(machine: Machine, repository: Path, kinds: list[str], sessions: int, seconds: float) -> int:
    """Checks that clients notice nothing of kills of these kinds; returns how many there were."""
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print("SEED", seed)
    random_ = random.Random(seed)

    async def chaos(end: float) -> int:
        kills = 0
        while time.monotonic() < end - 2:
            await asyncio.sleep(random_.uniform(0.5, 3))
            await asyncio.to_thread(machine.kill, random_.choice(kinds), random_)
            kills += 1
            await asyncio.to_thread(lambda: until(machine.ready))
        return kills

    return asyncio.run(through_chaos(machine.url, seed, sessions, seconds, chaos, repository))


@pytest.mark.long
def test_no_step_is_lost_or_doubled_whatever_is_killed(machine: Machine, repository: Path) -> None:
    assert survives(machine, repository, ["worker", "worker", "parent", "all"], 200, SECONDS)


@pytest.mark.parametrize("sync", ["checkpoints", "always"])
def test_a_killed_server_has_lost_nothing_that_was_answered(
    repository: Path, serve: Serve, tmp_path: Path, sync: str
) -> None:
    flags = "--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}", "--store-sync", sync
    server, x, ys = serve(*flags), frames(6), []
    durable = {"checkpoints": "process", "always": "disk"}[sync]
    with server.client() as client:
        session = create(client, "lstm")
        for position in range(3):
            answer = client.post(f"/sessions/{session}/step", json={"x": x[position], "position": position}).json()
            assert answer["durable"] == durable
            ys.append(answer["y"])
        deleted = create(client, "rnn")
        client.delete(f"/sessions/{deleted}")
        large = create(client, "rnn")
        whole = {"x": frames(3000), "outputs": "all", "position": 0}  # its answer is made again, not kept
        large_answer = client.post(f"/sessions/{large}/step", json=whole).json()
        client.put("/sessions/chosen", json={"model": "lstm"})
        client.post("/sessions/chosen/reset", json={"position": 0})
    server.stop(signal.SIGKILL)
    server = serve(*flags)
    with server.client() as client:
        again = client.post(f"/sessions/{session}/step", json={"x": x[2], "position": 2})
        assert (again.json()["y"], again.headers["idempotent-replay"]) == (ys[2], "true")
        ys += [client.post(f"/sessions/{session}/step", json={"x": row}).json()["y"] for row in x[3:]]
        body = {"model": "lstm", "sequences": [x], "outputs": "all"}
        assert ys == client.post("/predict", json=body).json()["outputs"][0]
        assert client.post(f"/sessions/{large}/step", json=whole).json() == large_answer
        assert client.put("/sessions/chosen", json={"model": "lstm"}).status_code == 200
        assert client.put("/sessions/chosen", json={"model": "rnn"}).status_code == 409
        assert client.post("/sessions/chosen/reset", json={"position": 0}).headers["idempotent-replay"] == "true"
        assert client.get(f"/sessions/{deleted}").status_code == 410
        listed = {one["session"] for one in client.get("/sessions").json()["sessions"]}
        assert listed == {session, large, "chosen"}
    assert server.stop() == 0


def test_a_session_that_expired_while_the_server_was_down_is_answered_as_expired(
    repository: Path, serve: Serve, tmp_path: Path
) -> None:
    flags = "--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}", "--session-idle-seconds", "0.1"
    server = serve(*flags)  # a restart takes longer
    with server.client() as client:
        session = create(client, "lstm")
    server.stop(signal.SIGKILL)
    with serve(*flags).client() as client:
        answer = client.get(f"/sessions/{session}")
        assert (answer.status_code, answer.json()["reason"]) == (410, "expired")


def test_sessions_of_models_that_are_not_here_wait_for_them(repository: Path, serve: Serve, tmp_path: Path) -> None:
    few = tmp_path / "models"
    shutil.copytree(repository / "lstm", few / "lstm")
    store = "--store", f"lmdb:{tmp_path / 'store'}"
    x = frames(2)
    with (server := serve("--models", str(repository), *store)).client() as client:
        here, elsewhere, unwanted = create(client, "lstm"), create(client, "rnn"), create(client, "rnn")
        for session in (here, elsewhere):
            assert client.post(f"/sessions/{session}/step", json={"x": x[0]}).status_code == 200
    assert server.stop() == 0
    with (server := serve("--models", str(few), *store)).client() as client:
        assert client.post(f"/sessions/{here}/step", json={"x": x[1]}).json()["position"] == 2
        for answer in (
            client.post(f"/sessions/{elsewhere}/step", json={"x": x[1]}),
            client.get(f"/sessions/{elsewhere}"),
        ):
            assert (answer.status_code, problem_kind(answer)) == (503, "model-version-not-here")
            assert "rnn" in answer.json()["detail"]
        assert {one["session"] for one in client.get("/sessions").json()["sessions"]} == {here, elsewhere, unwanted}
        assert client.delete(f"/sessions/{unwanted}").status_code == 204
    assert server.stop() == 0
    with serve("--models", str(repository), *store).client() as client:
        assert client.post(f"/sessions/{elsewhere}/step", json={"x": x[1]}).json()["position"] == 2


def test_a_damaged_record_is_one_sessions_error(repository: Path, serve: Serve, tmp_path: Path) -> None:
    flags = "--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}"
    server = serve(*flags)
    with server.client() as client:
        held, later, sound = (create(client, "rnn") for _ in range(3))
        for session in (held, later, sound):
            assert client.post(f"/sessions/{session}/step", json={"x": frames(1)[0]}).status_code == 200
        cut_record(tmp_path / "store", held)
        is_refused_and_deleted(client, held, sound)
    assert server.stop() == 0
    cut_record(tmp_path / "store", later)
    server = serve(*flags)
    with server.client() as client:
        is_refused_and_deleted(client, later, sound)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def cut_record(store: Path, session: str) -> None:
    with lmdb.open(str(store / "0"), max_dbs=16) as environment, environment.begin(write=True) as transaction:
        sessions, key = environment.open_db(b"sessions", transaction, create=False), f"/{session}".encode()
        transaction.put(key, transaction.get(key, b"", db=sessions)[:20], db=sessions)


def is_refused_and_deleted(client: httpx.Client, damaged: str, sound: str) -> None:
    for _ in range(2):
        answer = client.post(f"/sessions/{damaged}/step", json={"x": frames(1)[0]})
        assert (answer.status_code, problem_kind(answer)) == (500, "session-unreadable")
        assert client.post(f"/sessions/{sound}/step", json={"x": frames(1)[0]}).status_code == 200
    listed = [one["session"] for one in client.get("/sessions").json()["sessions"]]
    assert damaged not in listed
    assert sound in listed
    assert client.delete(f"/sessions/{damaged}").status_code == 204
    assert client.get(f"/sessions/{damaged}").status_code == 410


def test_a_second_server_over_the_folder_is_refused(repository: Path, serve: Serve, tmp_path: Path) -> None:
    flags = "--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}"
    serve(*flags)
    assert "another server uses" in refusal(*flags)


def test_a_folder_that_cannot_be_written_is_refused(repository: Path, serve: Serve, tmp_path: Path) -> None:
    store, reason = tmp_path / "store", "Read-only file system"
    serve("--models", str(repository), "--store", f"lmdb:{store}").stop()
    mounts = ["mount", "--bind", str(store), str(store)], ["mount", "-o", "remount,bind,ro", str(store)]
    if any(subprocess.run(mount, capture_output=True).returncode for mount in mounts):
        store, reason = Path("/sys/store"), "cannot be used"  # not even by root
    try:
        assert reason in refusal("--models", str(repository), "--store", f"lmdb:{store}")
    finally:
        subprocess.run(["umount", str(store)], capture_output=True)


def test_a_server_whose_folder_was_replaced_writes_no_more_and_leaves_the_new_one_alone(
    machine: Machine, repository: Path, serve: Serve, tmp_path: Path
) -> None:
    store, backup = tmp_path / "store", tmp_path / "backup"

    def step() -> httpx.Response:  # by either worker
        return httpx.post(f"{machine.url}/sessions/{session}/step", json={"x": frames(1)[0]}, timeout=60)

    with httpx.Client(base_url=machine.url) as client:
        session = create(client, "rnn")
    assert run("sessions", "backup", str(backup), "--store", f"lmdb:{store}").returncode == 0
    assert step().json()["position"] == 1
    shutil.rmtree(store)
    assert run("sessions", "restore", str(backup), "--store", f"lmdb:{store}").returncode == 0
    second = serve("--models", str(repository), "--store", f"lmdb:{store}")
    refused = until(step, lambda answer: answer.status_code == 503)
    assert problem_kind(refused) == "store-away"
    machine.kill("worker", random.Random(0))
    until(lambda: "was replaced under this server" in machine.log.read_text())  # the next worker does not begin
    machine.process.terminate()
    assert machine.process.wait(60) == 0
    assert all(found is not None and not found.clean for found in map(Checkpoint.load, (store / "0", store / "1")))
    with second.client() as client:
        assert client.post(f"/sessions/{session}/step", json={"x": frames(1)[0]}).json()["position"] == 1
    assert second.stop() == 0


def refusal(*flags: str) -> str:
    """Returns the one line with which a server that is started with these flags ends."""
    done = run("serve", "--port", "0", *flags)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert line.startswith("cellserve serve: --store: ")
    return line


def test_pages_go_on_after_the_longest_ids(repository: Path, serve: Serve, tmp_path: Path) -> None:
    server = serve("--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}")
    tensor = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": frames(1)[0]}
    names = [f"{number:0128}" for number in range(3)]
    with server.client() as client:
        for name in names:
            body = {"inputs": [tensor], "parameters": {"sequence_id": name, "sequence_start": True}}
            assert client.post("/v2/models/decaying/infer", json=body).status_code == 200
        found, after = [], "0.0"
        while after is not None:
            page = client.get("/sessions", params={"limit": 1, "after": after}).json()
            found += [one["session"] for one in page["sessions"]]
            after = page["next"]
    assert found == [f"decaying~{name}" for name in names]
