"""`cellserve bench` against real servers: every surface is measured without an error, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

import httpx
import pytest

from cellserve.benchmark.arguments import KEY_VARIABLE
from tests.e2e.helpers import bearer
from tests.fork_server import Forked, fork, run
from tests.helpers import until
from tests.server import Serve, Server, start_server

SHORT = ("--seconds", "0.3", "--warm-up", "0.1")


def bench(
    *arguments: str, serve: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command with short loads; `serve` are flags of the server that it starts."""
    more = ("--", *serve) if serve else ()
    return run("bench", *arguments, *SHORT, *more, environment=environment, timeout=300)


def figures(*arguments: str, **options: Any) -> dict[str, Any]:
    """Returns what `--json -` prints; nothing else is on stdout."""
    done = bench(*arguments, "--json", "-", **options)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def checked(document: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Returns the loads by surface and sessions; all of them had answers and no errors."""
    for load in document["loads"]:
        assert load["answers"] > 0, load
        assert load["errors"] == {}, load
        assert 0 < load["p50_ms"] <= load["p95_ms"] <= load["p99_ms"] <= load["max_ms"]
        assert load["steps_per_s"] > 0
        assert load["busy"] > 0
    return {(load["surface"], load["sessions"]): load for load in document["loads"]}


def sessions(server: Server) -> list[Any]:
    with server.client() as client:
        return list(client.get("/sessions").json()["sessions"])


def steps_run(server: Server) -> float:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("cellserve_steps_total{"))


def test_a_running_server_is_measured_on_every_surface(server: Server, tmp_path: Path) -> None:
    before = steps_run(server)
    drawn = tmp_path / "curve.svg"
    document = figures("lstm", "--url", server.url, "--sessions", "1,6", "--steps", "3-9", "--svg", str(drawn))
    loads = checked(document)
    assert set(loads) == {(name, n) for name in ("http", "websocket", "frames", "predict") for n in (1, 6)}
    assert (document["model"], document["version"], document["server"]) == ("lstm", "1", server.url)
    # All of it was really run, and by the server that was named.
    assert steps_run(server) - before > sum(load["steps_per_s"] * load["seconds"] for load in loads.values())
    assert loads["frames", 6]["server"]["rows"] > 5  # /metrics says so
    assert document["advice"]
    assert len(list(ElementTree.parse(drawn).iter("{http://www.w3.org/2000/svg}polyline"))) == 4
    assert sessions(server) == []


def test_the_table_the_curve_and_the_advice_are_printed_with_a_plain_line_a_phase(server: Server) -> None:
    done = bench("lstm:1", "--url", server.url, "--sessions", "2", "--surfaces", "http,predict-safetensors")
    assert done.returncode == 0, done.stderr
    assert [line.partition("s  ")[2] for line in done.stderr.splitlines()] == [
        "http, 2 sessions",
        "predict-safetensors, 2 sessions",
    ]
    assert done.stdout.startswith(f"lstm version 1 on {server.url}\n")
    for said in (
        "p99 ms",
        "generator",
        "p99 latency, ms",
        "h http, p predict-safetensors; the number: sessions",
        "\n- ",
    ):
        assert said in done.stdout


def test_an_open_loop_sends_at_its_rate(server: Server) -> None:
    document = figures("lstm", "--url", server.url, "--rate", "20,50", "--sessions", "3", "--surfaces", "http,frames")
    for load in document["loads"]:
        assert load["errors"] == {}
        assert load["answers"] == round(load["rate"] * 0.3)
        assert load["sessions"] == 3


@pytest.mark.long
def test_models_of_every_signature_are_measured(kinds: Path, serve: Serve) -> None:
    server = serve("--models", str(kinds))
    everywhere = "http,websocket,frames,predict,predict-safetensors"
    for model, surfaces in (("symbols", everywhere), ("letters", "http,frames,predict-safetensors")):
        checked(figures(model, "--url", server.url, "--sessions", "3", "--surfaces", surfaces))
    flags = ("symbols", "--url", server.url, "--protocol", "v2", "--sessions", "3")
    assert set(checked(figures(*flags, "--surfaces", "sequences,stateless"))) == {("sequences", 3), ("stateless", 3)}
    whole = checked(figures("both-ways", "--url", server.url, "--sessions", "3"))
    assert set(whole) == {("predict", 3)}  # it cannot be stepped
    assert sessions(server) == []


def test_several_generators_share_the_sessions(server: Server) -> None:
    flags = ("--processes", "2", "--sessions", "6", "--surfaces", "http,frames")
    loads = checked(figures("lstm", "--url", server.url, *flags))
    assert loads["frames", 6]["steps_per_s"] / loads["frames", 6]["requests_per_s"] == pytest.approx(3)
    assert sessions(server) == []


def test_another_server_is_measured_by_the_inference_protocol(server: Server) -> None:
    flags = ("lstm", "--url", server.url, "--protocol", "v2", "--sessions", "1,4")
    loads = checked(figures(*flags))
    assert set(loads) == {("sequences", 1), ("sequences", 4)}  # the model's configuration says that it has them
    assert loads["sequences", 4]["server"]["rows"] > 1
    for more, steps in ((("--steps", "7"), 7), (("--shape", "x:2,3,5"), 6)):
        whole = checked(figures(*flags, "--sessions", "4", "--surfaces", "stateless", *more))["stateless", 4]
        assert whole["steps_per_s"] / whole["requests_per_s"] == pytest.approx(steps)
    assert sessions(server) == []


def test_keys_are_sent_and_wanted(keys: tuple[Path, str, str], repository: Path, serve: Serve) -> None:
    file, alice, _ = keys
    server = serve("--models", str(repository), "--api-keys-file", str(file), "--operators", "alice")
    flags = ("lstm", "--url", server.url, "--sessions", "2")
    by_flag = checked(figures(*flags, "--key", alice, "--surfaces", "http,websocket"))
    assert all(load["server"] for load in by_flag.values())  # an operator may read /metrics
    checked(figures(*flags, "--protocol", "v2", environment={KEY_VARIABLE: alice}))
    refused = bench("lstm", "--url", server.url)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "401: the server requires a key that it knows: give one with --key" in refused.stderr
    assert httpx.get(f"{server.url}/sessions", headers=bearer(alice)).json()["sessions"] == []


def test_without_a_url_a_server_is_started_and_the_settings_that_may_help_are_tried(repository: Path) -> None:
    flags = ("--models", str(repository), "--sessions", "8", "--surfaces", "http")
    document = figures("lstm", *flags, serve=("--max-batch", "2"))
    checked(document)
    assert document["server"] == "cellserve serve --max-batch 2"
    (tried,) = [one for one in document["advice"] if one["flags"] == ["--max-batch", "8"]]
    assert tried["why"] == "http, 8 sessions: the mean batch is 2, --max-batch is 2, and more waits"
    assert tried["what"].startswith("tried --max-batch 8: ")


@pytest.fixture
def small(repository: Path) -> Iterator[Server]:
    """A server that holds four sessions."""
    server = start_server("--models", str(repository), "--max-sessions", "4")
    yield server
    assert server.stop() == 0


def test_a_load_that_cannot_begin_is_reported_in_one_line_and_leaves_nothing(small: Server) -> None:
    done = bench("lstm", "--url", small.url, "--sessions", "6", "--surfaces", "http")
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("cellserve bench: http, 6 sessions: 503: ")
    assert sessions(small) == []


@contextmanager
def begun(server: Server, count: int, *arguments: str) -> Iterator[tuple[Forked, TextIO]]:
    """Starts the command with so many sessions; gives it, and its stderr, when all of them have been stepped."""
    with tempfile.TemporaryFile("w+") as errors:
        command = "bench", "lstm", "--url", server.url, "--sessions", str(count), *arguments
        process = fork(*command, errors=errors.fileno())
        until(lambda: sessions(server), lambda found: len(found) == count and all(one["position"] for one in found))
        yield process, errors


def ended(process: Forked, errors: TextIO) -> tuple[str, str]:
    """Returns what the command has written when it has ended."""
    out, _ = process.communicate(timeout=120)
    errors.seek(0)
    return out, errors.read()


@pytest.mark.parametrize("surface", ["http", "websocket", "frames"])
def test_errors_are_counted_by_status(surface: str, server: Server) -> None:
    flags = ("--surfaces", surface, "--seconds", "2", "--json", "-")
    with begun(server, 3, *flags) as (process, errors), server.client() as client:
        lost = sessions(server)[0]["session"]
        assert client.delete(f"/sessions/{lost}").status_code == 204
        out, err = ended(process, errors)
    assert process.returncode == 0, err
    (load,) = json.loads(out)["loads"]
    assert load["errors"].keys() == {"410"}
    assert load["errors"]["410"] > 0
    assert load["samples"]["410"].startswith("410: the session was deleted")
    assert load["answers"] > 0
    assert sessions(server) == []


def test_sequences_that_are_refused_are_counted(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository), "--max-body-bytes", "1024")
    flags = ("lstm", "--url", server.url, "--sessions", "2", "--surfaces", "predict", "--steps", "3000")
    done = bench(*flags)
    assert done.returncode == 0, done.stderr
    assert "413: " in done.stdout and "predict, 2 sessions: the first error: 413: " in done.stdout


@pytest.mark.parametrize(("number", "surface"), [(signal.SIGINT, "http"), (signal.SIGTERM, "frames")])
def test_interrupted_it_deletes_its_sessions_and_ends(server: Server, number: int, surface: str) -> None:
    with begun(server, 8, "--surfaces", surface, "--seconds", "60") as (process, errors):
        os.killpg(process.pid, number)  # as a terminal does: its generators get it too
        out, err = ended(process, errors)
    assert process.returncode == 130
    assert (out, err.splitlines()[-1]) == ("", "cellserve bench: interrupted")
    assert "Traceback" not in err
    assert sessions(server) == []


def test_a_server_that_dies_is_counted_as_connections_that_are_lost(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository))
    with begun(server, 2, "--surfaces", "http", "--seconds", "4", "--json", "-") as (process, errors):
        time.sleep(1)  # past the warm-up
        server.stop(signal.SIGKILL)
        out, err = ended(process, errors)
    assert process.returncode == 0, err
    (load,) = json.loads(out)["loads"]
    assert load["errors"]["no connection"] > 0
    assert "2 sessions could not be deleted" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("lstn",), "there is no model 'lstn'"),
        (("lstm", "--surfaces", "htp"), "--surfaces: 'htp' does not fit this model: choose from http, websocket"),
        (("lstm", "--protocol", "v2", "--shape", "z:1"), "--shape: lstm has no input 'z': choose from x"),
        (("lstn", "--protocol", "v2"), "404"),
        (("lstm", "--svg", "/nowhere/curve.svg"), "/nowhere/curve.svg: there is no such folder"),
    ],
)
def test_a_mistake_is_one_line(server: Server, flags: tuple[str, ...], said: str) -> None:
    done = bench(*flags, "--url", server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("cellserve bench: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_server_that_does_not_start_is_reported_in_one_line(tmp_path: Path) -> None:
    done = bench("lstm", "--models", str(tmp_path / "none"))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("cellserve bench: cellserve serve did not start: ")
    assert "none" in last
