"""The embedded store on a full disk: what can go on does, nothing is lost, and it recovers by itself."""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.helpers import create, frames, whole_sequence
from tests.e2e.test_store_faults import metric
from tests.helpers import until
from tests.server import Serve, Server

MEGABYTES = 4
FILES = (
    "used_bytes", "file_bytes", "max_bytes", "free_bytes", "readers",
    "sync_duration_seconds_count", "sync_duration_seconds_sum",
)  # fmt: skip


class Disk:
    """A small disk; where none can be mounted, a folder in which the server's files cannot grow while it is full."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
        self.bounds_files = not mounted or subprocess.run(mount, capture_output=True).returncode != 0

    def fill(self, server: Server) -> None:
        if self.bounds_files:
            largest = max(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            return
        with (self.folder / "ballast").open("wb", buffering=0) as ballast:
            try:
                while ballast.write(bytes(4096)):
                    pass
            except OSError:
                pass

    def make_room(self, server: Server) -> None:
        if not self.bounds_files:
            (self.folder / "ballast").unlink()
        else:
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    def unmount(self) -> None:
        if not self.bounds_files:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk", request.param == "small disk")
    yield disk
    disk.unmount()


class Session:
    """A session that is stepped on, and what it has answered so far."""

    def __init__(self, client: httpx.Client) -> None:
        self.client, self.id = client, create(client, "lstm")
        self.frames = frames(100)
        self.ys: list[list[float]] = []

    def step(self, position: int) -> httpx.Response:
        x = self.frames[position % len(self.frames)]
        return self.client.post(f"/sessions/{self.id}/step", json={"x": x, "position": position})

    def advance(self) -> httpx.Response:
        answer = self.step(len(self.ys))
        if answer.status_code == 200:
            self.ys.append(answer.json()["y"])
        return answer


@pytest.mark.parametrize(
    ("disk", "sync"),
    [
        ("small disk", "checkpoints"),
        ("small disk", "always"),
        pytest.param("bounded files", "checkpoints", marks=pytest.mark.long),
    ],
    indirect=["disk"],
)
def test_on_a_full_disk_reads_still_work_and_writes_do_once_there_is_room(
    repository: Path, serve: Serve, disk: Disk, sync: str
) -> None:
    flags = "--models", str(repository), "--store", f"lmdb:{disk.folder / 'store'}", "--store-sync", sync
    server = serve(*flags)
    with server.client() as client:
        session = Session(client)
        for _ in range(5):
            assert session.advance().status_code == 200
        files = {name: metric(client, f"cellserve_store_{name}") for name in FILES}
        assert 0 < files["used_bytes"] <= files["file_bytes"] < min(files["free_bytes"], files["max_bytes"])
        assert files["readers"] > 0
        assert files["sync_duration_seconds_count"] >= (5 if sync == "always" else 1)
        assert files["sync_duration_seconds_sum"] > 0
        age = re.search(r"^cellserve_store_checkpoint_age_seconds (\S+)", client.get("/metrics").text, re.M)
        assert (age is None) == (sync == "always")
        assert age is None or 0 <= float(age[1]) < 300
        disk.fill(server)
        until(
            lambda: client.post("/sessions", json={"model": "rnn"}), lambda answer: answer.status_code == 503, pause=0
        )
        if sync == "checkpoints":
            until(session.advance, lambda answer: answer.status_code == 503, pause=0)
        if not disk.bounds_files:
            assert metric(client, "cellserve_store_free_bytes") == 0
            assert metric(client, 'cellserve_store_errors_total{reason="full"}') > 0 or sync == "always"
            assert metric(client, 'cellserve_store_errors_total{reason="failed"}') == 0
        whatever_only_reads_goes_on(client, session)
        # Pages that steps have freed are used again: at once, or after a checkpoint, which comes early.
        for _ in range(40):
            until(session.advance, lambda answer: answer.status_code == 200)
        if not disk.bounds_files:
            assert server.stop() == 0
            server = serve(*flags)  # a start needs no room either
    with server.client() as client:
        session.client = client
        whatever_only_reads_goes_on(client, session)
        disk.make_room(server)
        until(lambda: client.post("/sessions", json={"model": "rnn"}), lambda answer: answer.status_code == 201)
        for _ in range(10):
            assert session.advance().status_code == 200
        # Nothing was lost or applied twice.
        x = [session.frames[position % len(session.frames)] for position in range(len(session.ys))]
        assert session.ys == whole_sequence(server, "lstm", x)
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.log)


def whatever_only_reads_goes_on(client: httpx.Client, session: Session) -> None:
    assert client.get(f"/sessions/{session.id}").json()["position"] == len(session.ys)
    assert client.get(f"/sessions/{session.id}/state").status_code == 200
    assert session.id in {one["session"] for one in client.get("/sessions").json()["sessions"]}
    again = session.step(len(session.ys) - 1)
    assert (again.json()["y"], again.headers["idempotent-replay"]) == (session.ys[-1], "true")
    body = {"model": "lstm", "sequences": [session.frames]}
    assert client.post("/predict", json=body).status_code == 200
    # The server stays in the balancer: it is the only one that has these sessions.
    assert client.get("/readyz").status_code == client.get("/healthz").status_code == 200
