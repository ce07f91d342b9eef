"""Nothing but bad requests: the answer to each says what was wrong and where, and it costs nobody else anything."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.e2e.helpers import create
from tests.fork_server import run
from tests.server import Serve, Server

GOOD = [[0.5] * 5, [0.25] * 5]


def sequences(value: Any, step: int = 1) -> bytes:
    """A body whose fourth sequence has a value of its own at [step][2]."""
    bad = json.loads(json.dumps(GOOD))
    bad[step][2] = value
    return json.dumps({"model": "lstm", "sequences": [GOOD, GOOD, GOOD, bad]}).encode()


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "lstm", "sequences": [GOOD], **fields}).encode()


BAD = {
    "not JSON": (b"{", 400, "", "send a JSON document"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "", "send a JSON document"),
    "NaN": (sequences(float("nan")), 422, "sequences[3][1][2]", "not a finite number"),
    "Infinity": (sequences(float("inf")), 422, "sequences[3][1][2]", "not a finite number"),
    "beyond float32": (sequences(1e39), 422, "sequences[3][1][2]", "not a finite number"),
    "beyond float64": (body().replace(b"0.5", b"1e999", 1), 422, "sequences[0][0][0]", "not a finite number"),
    "a string": (sequences("1"), 422, "sequences[3][1][2]", "expected a number, got a string"),
    "a boolean": (sequences(True), 422, "sequences[3][1][2]", "expected a number, got a boolean"),
    "null": (sequences(None), 422, "sequences[3][1][2]", "expected a number, got null"),
    "wrong features": (body(sequences=[[[1.0] * 4]]), 422, "sequences[0][0]", "4 numbers where the model takes 5"),
    "ragged step": (body(sequences=[GOOD, [[1.0] * 5, [1.0] * 6]]), 422, "sequences[1][1]", "6 numbers"),
    "empty sequence": (body(sequences=[GOOD, []]), 422, "sequences[1]", "send at least one time step"),
    "no sequences": (body(sequences=[]), 422, "sequences", "send at least one sequence"),
    "unknown model": (body(model="lstn"), 404, "", "send one of"),
    "unknown field": (body(sequence=1), 422, "sequence", "send sequences, and optionally model, outputs, states"),
    "missing field": (b"{}", 422, "sequences", "sequences: missing: send sequences, and optionally model"),
    "unknown outputs": (
        body(outputs="first"),
        422,
        "outputs",
        '\'first\' is not one of its values: send "all" or "last"',
    ),
    "outputs of another type": (body(outputs=5), 422, "outputs", 'got an integer: send "all" or "last"'),
    "an array": (b"[]", 422, "", "expected an object, got an array: send sequences, and optionally model"),
    "a number for a time step": (
        body(sequences=[[1, 2]]),
        422,
        "sequences[0][0]",
        "a time step is [5 numbers], a sequence",
    ),
    "states of another number": (body(states=[]), 422, "states", "0 entries for 1 sequences"),
    "states of other names": (body(states=[{"h": []}]), 422, "states[0]", "the model's states are"),
    "too large": (b" " * (17 * 1024 * 1024), 413, "", "larger than"),
    "deeply nested": (b'{"sequences": ' + b"[" * 100_000, 400, "", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_body_is_answered_with_a_problem_that_names_the_place(server: Server, case: str) -> None:
    content, status, place, told = BAD[case]
    with server.client() as client:
        session = client.post("/sessions", json={"model": "lstm"}).json()["session"]
        before = client.post(f"/sessions/{session}/step", json={"x": GOOD, "outputs": "all"}).json()
        answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
        after = client.post(f"/sessions/{session}/step", json={"x": GOOD[0]}).json()
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    if case != "deeply nested":  # 400 or 422: both say that it is the client's mistake
        assert (answer.status_code, problem["status"]) == (status, status), problem
    assert 400 <= answer.status_code < 500
    assert told in problem["detail"]
    assert problem.get("place", "") == place or not place
    assert problem["title"]
    assert after["position"] == before["position"] + 1


@pytest.mark.parametrize(
    ("x", "place", "told"),
    [
        ([1.0] * 4, "x", "4 numbers where the model takes 5"),
        ([[1.0] * 5, [1.0]], "x[1]", "1 number where"),
        ([], "x", ""),
        ("0.5", "x", "expected an array"),
        ([1.0, 2.0, "3", 4.0, 5.0], "x[2]", "expected a number, got a string"),
        ([3e38, -3e39, 0.0, 0.0, 0.0], "x[1]", "not a finite number"),
    ],
)
def test_a_bad_step_is_named_and_not_applied(server: Server, x: Any, place: str, told: str) -> None:
    with server.client() as client:
        session = client.post("/sessions", json={"model": "lstm"}).json()["session"]
        answer = client.post(f"/sessions/{session}/step", json={"x": x})
        assert answer.status_code == 422, answer.text
        assert answer.json()["place"] == place
        assert told in answer.json()["detail"]
        assert client.get(f"/sessions/{session}").json()["position"] == 0


@pytest.mark.parametrize(
    ("path", "body", "place", "told"),
    [
        ("/step", {"y": [1.0]}, "y", "y: unknown field: send x, and optionally outputs, position"),
        (
            "/step",
            {"x": GOOD, "extra": 1},
            "extra",
            "extra: unknown field: send x, and optionally outputs",
        ),
        ("/step", {"x": GOOD, "outputs": "some"}, "outputs", 'send "all" or "last"'),
        ("/step", {}, "x", "x: missing: send x, and optionally outputs, position"),
        ("/step", {"x": 5}, "x", "expected an array, got an integer: a time step is [5 numbers]"),
        ("/reset", {"positon": 1}, "positon", "send any of position"),
        ("/fork", {"id": "a"}, "id", "send any of session, position"),
    ],
)
def test_an_unknown_field_or_value_is_answered_with_the_known_ones(
    server: Server, path: str, body: Any, place: str, told: str
) -> None:
    with server.client() as client:
        session = client.post("/sessions", json={"model": "lstm"}).json()["session"]
        answer = client.post(f"/sessions/{session}{path}", json=body)
    assert (answer.status_code, answer.json()["place"]) == (422, place), answer.text
    assert told in answer.json()["detail"]


def test_a_wrong_content_type_method_path_or_session_is_answered_with_advice(server: Server) -> None:
    with server.client() as client:
        assert client.post("/predict", content=body(), headers={"content-type": "text/plain"}).status_code == 415
        assert client.post("/predict", content=body()).status_code == 415
        assert client.get("/predict").status_code == 405
        assert client.get("/nothing").status_code == 404
        for answer in (
            client.post("/sessions/nobody/step", json={"x": GOOD}),
            client.get("/sessions/nobody"),
            client.delete("/sessions/nobody"),
            client.get("/models/nobody"),
        ):
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_that_may_be_left_out_is_not_missed_whatever_the_content_type(server: Server) -> None:
    with server.client() as client:
        session = client.post("/sessions", json={"model": "lstm"}).json()["session"]
        for path, status in ((f"/sessions/{session}/fork", 201), (f"/sessions/{session}/reset", 200)):
            for headers in ({}, {"content-type": "application/json"}, {"content-type": "application/octet-stream"}):
                answer = client.post(path, headers=headers)
                assert answer.status_code == status, answer.text
            assert client.post(path, content=b"{}").status_code == 415
        # There are several models: which one is the only thing that is missing.
        empty, nothing = client.post("/sessions", json={}), client.post("/sessions")
        assert (nothing.status_code, nothing.json()["detail"]) == (empty.status_code, empty.json()["detail"])
        assert nothing.status_code == 404


def test_wrong_methods_and_upgrades_are_answered_with_what_the_path_takes(server: Server) -> None:
    with server.client() as client:
        for path, allowed in (
            ("/sessions", "GET, POST"),
            ("/sessions/a", "DELETE, GET, PUT"),
            ("/predict", "POST"),
            ("/models", "GET"),
            ("/healthz", "GET, HEAD"),
        ):
            answer = client.patch(path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed), path
            assert answer.json()["allow"] == allowed
        for path in ("/healthz", "/readyz"):
            assert (client.head(path).status_code, client.head(path).content) == (200, b"")
        for method in ("GET", "POST"):
            answer = client.request(method, "/stream")
            assert (answer.status_code, answer.headers["upgrade"]) == (426, "websocket")
            assert answer.json()["type"] == "urn:cellserve:problem:upgrade-required"


def test_compressed_bodies_are_accepted_on_every_path_up_to_the_limit(server: Server) -> None:
    def compressed(content: bytes, encoding: str = "gzip") -> dict[str, Any]:
        packed = gzip.compress(content) if encoding == "gzip" else zlib.compress(content)
        return {"content": packed, "headers": {"content-type": "application/json", "content-encoding": encoding}}

    with server.client() as client:
        plain = client.post("/predict", json={"model": "lstm", "sequences": [GOOD]}).json()
        assert client.post("/predict", **compressed(body())).json() == plain
        assert client.post("/predict", **compressed(body(), "deflate")).json() == plain
        tensors = gzip.compress(save({"x": np.array([GOOD], np.float32)}))
        headers = {"content-type": "application/x-safetensors", "content-encoding": "gzip"}
        answer = client.post("/predict?model=lstm", content=tensors, headers=headers)
        assert np.array_equal(load(answer.content)["y"], np.array(plain["outputs"][0], np.float32))
        session = client.post("/sessions", **compressed(b'{"model": "lstm"}')).json()["session"]
        step = client.post(f"/sessions/{session}/step", **compressed(json.dumps({"x": GOOD}).encode())).json()
        assert (step["position"], step["y"]) == (len(GOOD), plain["outputs"][0])
        bomb = client.post("/predict", **compressed(b" " * (64 * 2**20)))
        assert (bomb.status_code, "when decompressed" in bomb.json()["detail"]) == (413, True)
        headers = {"content-type": "application/json", "content-encoding": "br"}
        refused = client.post("/predict", content=body(), headers=headers)
        assert (refused.status_code, "send gzip, deflate or neither" in refused.json()["detail"]) == (415, True)


def test_a_small_bound_of_bodies_holds_on_every_path(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository), "--max-body-bytes", "1024")
    with server.client() as client:
        session = create(client, "lstm")
        large = {"x": [GOOD[0]] * 80}
        assert client.post(f"/sessions/{session}/step", json=large).status_code == 413
        assert client.post("/predict", json={"model": "lstm", "sequences": [large["x"]]}).status_code == 413
        assert client.post(f"/sessions/{session}/step", json={"x": GOOD[0]}).json()["position"] == 1


def test_reloading_takes_no_body(server: Server) -> None:
    with server.client() as client:
        answer = client.post("/models/reload", json={"model": "lstm:2"})
        assert (answer.status_code, "takes none" in answer.json()["detail"]) == (422, True)
        assert client.post("/models/reload").status_code == client.post("/models/reload", json={}).status_code == 200


@pytest.mark.parametrize(
    ("query", "place", "told"),
    [
        ("next=0.5", "next", "send limit, after, or none"),
        ("after=zzz", "after", "after: 'zzz' is not a page: send `next` of the page before"),
        ("limit=0", "limit", ""),
    ],
)
def test_a_bad_page_is_answered_with_how_to_ask_for_one(server: Server, query: str, place: str, told: str) -> None:
    with server.client() as client:
        answer = client.get(f"/sessions?{query}")
    assert (answer.status_code, answer.json()["place"]) == (422, place)
    assert told in answer.json()["detail"]


def test_a_taken_port_is_reported_before_any_model_is_loaded(server: Server, repository: Path) -> None:
    port = server.url.rpartition(":")[2]
    for flags in (("--port", port), ("--port", "0", "--operations-port", port), ("--port", "0", "--grpc-port", port)):
        failed = run("serve", "--models", str(repository), *flags)
        told = f"cellserve serve: {flags[-2]} {port}: Address already in use\n"
        assert (failed.returncode, failed.stderr) == (1, told)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--port", "7", "--operations-port", "7"), "--operations-port: 7 is --port already: give it another"),
        (("--grpc-port", "8000"), "--grpc-port: 8000 is --port already: give it another"),
        (("--operations-port", "7", "--grpc-port", "7"), "--grpc-port: 7 is --operations-port already"),
    ],
)
def test_equal_ports_are_refused_in_one_line(flags: tuple[str, ...], told: str) -> None:
    failed = run("serve", *flags)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"cellserve serve: {told}") and failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--provider", "cuda"], "CUDA"),
        (["--models", "nowhere"], "there is no model to serve"),
        (["--port", "many"], "--port"),
        (["--provider", "tpu"], "--provider"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(repository: Path, flags: list[str], told: str) -> None:
    done = run("serve", "--models", str(repository), "--port", "0", *flags)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert told in [line for line in done.stderr.splitlines() if not line.startswith("INFO")][-1]


def test_a_damaged_model_is_not_served(repository: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(repository / "lstm", tmp_path / "lstm")
    with (tmp_path / "lstm/1/model.onnx").open("ab") as file:
        file.write(b"\0")
    done = run("serve", "--models", str(tmp_path), "--port", "0")
    assert done.returncode == 1
    assert "changed or damaged" in done.stderr


def test_the_html_pages_need_no_other_host(server: Server) -> None:
    with server.client() as client:
        page = client.get("/docs").text
        assert 'src="http' not in page
        assert 'href="http' not in page
        document = client.get("/openapi.json").json()
        assert {"/predict", "/sessions", "/sessions/{session_id}/step", "/models"} <= set(document["paths"])
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
