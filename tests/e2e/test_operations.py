"""What whoever runs a server sees of it: metrics, request ids, logs, traces; and who may see them."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect

from tests.e2e.helpers import answered, ask, bearer, binary, create, frames, new_key
from tests.fork_server import run
from tests.helpers import ROOT, free_port, until
from tests.redis_server import RedisServer
from tests.server import Serve, Server

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Scrape:
    """What `/metrics` says at one moment."""

    def __init__(self, client: httpx.Client, **options: Any) -> None:
        answer = client.get("/metrics", **options)
        assert answer.status_code == 200, answer.text
        self.families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        self.values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.values.get((name, frozenset(labels.items())), 0)

    def __repr__(self) -> str:
        return repr(self.values)

    def requests(self, surface: str) -> dict[str, float]:
        """By status."""
        return {
            dict(labels)["status"]: value
            for (name, labels), value in self.values.items()
            if name == "cellserve_requests_total" and dict(labels)["surface"] == surface
        }


def scraped(client: httpx.Client, says: Callable[[Scrape], bool]) -> Scrape:
    """Asks until the metrics say so."""
    return until(lambda: Scrape(client), says)


def test_each_surface_counts_what_it_has_answered(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository))
    lstm = {"model": "lstm", "version": "1"}
    x = frames(6)
    with server.client() as client, connect(server.url.replace("http", "ws") + "/stream") as stream:
        client.post("/predict", json={"model": "lstm", "sequences": [x, x[:2]]})  # 8 steps
        client.post("/predict", json={"model": "lstm", "sequences": [[["no"]]]})
        one, two = create(client, "lstm"), create(client, "lstm")
        for position in range(3):
            client.post(f"/sessions/{one}/step", json={"x": x[position], "position": position})
        again = client.post(f"/sessions/{one}/step", json={"x": x[2], "position": 2})
        assert again.headers["idempotent-replay"] == "true"
        assert client.post(f"/sessions/{one}/step", json={"x": x[5], "position": 1}).status_code == 409
        assert [ask(stream, op="attach", session=session)["handle"] for session in (one, two)] == [0, 1]
        ask(stream, op="step", session=0, x=x[3])
        assert ask(stream, op="step", session=7, x=x[3])["op"] == "error"
        stream.send(binary([0, 1], np.zeros((2, 2, 5))))  # 4 steps
        assert answered(stream.recv(timeout=30))[2] == [0, 0]
        positions = np.array([6, 9], "<u8").tobytes()
        head = struct.pack("<4I", 2, 0, 2, 1) + np.array([0, 1], "<u4").tobytes()
        stream.send(head + positions + np.zeros(10, "<f4").tobytes())  # 1 step, 1 refused
        assert json.loads(stream.recv(timeout=30))["problem"]["status"] == 409
        stream.recv(timeout=30)
        client.delete(f"/sessions/{two}")
        client.get("/nothing-here")
        scrape = Scrape(client)
    assert scrape.requests("predict") == {"200": 1, "422": 1}
    assert scrape.requests("sessions") == {"200": 4, "201": 2, "204": 1, "409": 1}
    assert scrape.requests("stream") == {"200": 4, "404": 1, "409": 1}
    assert scrape.requests("operations") == {"404": 1}
    for surface, count in (("predict", 2), ("sessions", 8), ("stream", 6), ("operations", 1)):
        assert scrape("cellserve_request_duration_seconds_count", surface=surface) == count
        assert scrape("cellserve_request_duration_seconds_bucket", surface=surface, le="+Inf") == count
    assert scrape("cellserve_problems_total", surface="predict", problem="invalid-input") == 1
    assert scrape("cellserve_problems_total", surface="sessions", problem="position-conflict") == 1
    assert scrape("cellserve_problems_total", surface="stream", problem="session-went-back") == 1
    assert scrape("cellserve_problems_total", surface="stream", problem="unknown-session") == 1
    assert scrape("cellserve_steps_total", **lstm) == 8 + 3 + 1 + 4 + 1
    rows = scrape("cellserve_tick_rows_sum", **lstm)
    ticks = scrape("cellserve_tick_rows_count", **lstm)
    assert ticks == scrape("cellserve_stage_duration_seconds_count", stage="run", **lstm)
    assert 6 <= ticks <= rows <= 2 * ticks
    assert scrape("cellserve_stage_duration_seconds_count", stage="queue", **lstm) >= 2 + 3 + 1 + 1 + 1
    assert scrape("cellserve_replays_total") == 1
    assert scrape("cellserve_sessions_created_total") == 2
    assert scrape("cellserve_sessions_ended_total", reason="deleted") == 1
    assert (scrape("cellserve_sessions"), scrape("cellserve_slots", **lstm)) == (1, 1)
    assert (scrape("cellserve_sockets"), scrape("cellserve_queued_steps", **lstm)) == (1, 0)
    assert scrape("process_resident_memory_bytes") > 1e6
    assert scrape("cellserve_steps_total", model="rnn", version="1") == 0


def test_metrics_in_json_are_the_samples_of_the_text(server: Server) -> None:
    with server.client() as client:
        client.post("/predict", json={"model": "lstm", "sequences": [frames(3)]})
        text = Scrape(client).values
        answer = client.get("/metrics", headers={"accept": "application/json"})
        assert (answer.headers["content-type"], answer.headers["vary"]) == ("application/json", "Accept")
        document = answer.json()
        browser = client.get("/metrics", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert browser.headers["content-type"].startswith("text/plain")
    found = {
        (name, frozenset(sample["labels"].items())): sample["value"]
        for name, samples in document["metrics"].items()
        for sample in samples
    }
    assert found.keys() >= text.keys()  # the request for the text is counted since
    steps = ("cellserve_steps_total", frozenset({("model", "lstm"), ("version", "1")}))
    assert found[steps] == text[steps] >= 3
    assert abs(document["time"] - time.time()) < 60


def test_expired_and_evicted_sessions_are_counted(repository: Path, serve: Serve) -> None:
    flags = "--max-sessions", "2", "--when-full", "evict", "--session-idle-seconds", "3"
    server = serve("--models", str(repository), *flags)
    with server.client() as client:
        for _ in range(3):
            create(client, "lstm")
        assert Scrape(client)("cellserve_sessions_ended_total", reason="evicted") == 1
        # The sessions are counted before those that have ended; some may end between the two.
        scrape = scraped(client, lambda now: now("cellserve_sessions") == 0)
        assert scrape("cellserve_sessions_ended_total", reason="expired") == 2
        assert scrape("cellserve_sessions_created_total") == 3


def test_sessions_of_a_shared_store_are_counted_as_they_end(
    repository: Path, serve: Serve, own_redis: RedisServer
) -> None:
    flags = "--store", own_redis.url, "--max-sessions", "2", "--when-full", "evict", "--session-idle-seconds", "5"
    server = serve("--models", str(repository), *flags)
    with server.client() as client:
        sessions = [create(client, "lstm") for _ in range(3)]
        client.delete(f"/sessions/{sessions[2]}")
        scrape = Scrape(client)
        assert (scrape("cellserve_sessions"), scrape("cellserve_sessions_created_total")) == (1, 3)
        ended = [
            scrape("cellserve_sessions_ended_total", reason=reason) for reason in ("deleted", "evicted", "expired")
        ]
        assert ended == [1, 1, 0]
        scrape = scraped(client, lambda now: now("cellserve_sessions") == 0)
        assert scrape("cellserve_sessions_ended_total", reason="expired") == 1


@pytest.mark.long
def test_metrics_of_workers_are_the_sum_and_outlive_a_worker(
    repository: Path, serve: Serve, own_redis: RedisServer
) -> None:
    server = serve("--models", str(repository), "--store", own_redis.url, "--workers", "2")
    lstm = {"model": "lstm", "version": "1"}
    x = frames(30)
    answering(server)
    with server.client() as client:
        session = create(client, "lstm")
        pids: set[int] = set()
        for position, row in enumerate(x):
            # Over a connection of its own, so that both workers have some.
            answer = httpx.post(f"{server.url}/sessions/{session}/step", json={"x": row, "position": position})
            assert answer.status_code == 200
            pids |= workers_of(server)
        assert len(pids) == 2
        scrape = scraped(client, lambda now: now("cellserve_steps_total", **lstm) == 30)
        assert scrape.requests("sessions") == {"200": 30, "201": 1}
        assert scrape("cellserve_stage_duration_seconds_count", stage="store", **lstm) == 30
        assert scrape("cellserve_stage_duration_seconds_bucket", stage="store", le="+Inf", **lstm) == 30
        assert (scrape("cellserve_sessions"), scrape("cellserve_sessions_created_total")) == (1, 1)
        started, memory = scrape("process_start_time_seconds"), scrape("process_resident_memory_bytes")
        assert time.time() - 600 < started < time.time()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)  # the parent asks them every half second: now it waits for an answer
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: httpx.get(f"{server.url}/readyz"), seconds=25)  # not only after the 30 that it would wait
    with server.client() as client:
        scrape = Scrape(client)
    # What those that are gone have counted is counted on; their memory is not.
    assert scrape("cellserve_steps_total", **lstm) == 30
    assert scrape.requests("sessions") == {"200": 30, "201": 1}
    assert 0 < scrape("process_resident_memory_bytes") < 1.5 * memory
    own_redis.stop(signal.SIGKILL)
    with server.client() as client:
        assert client.get(f"/sessions/{session}").status_code == 503
        scrape = scraped(client, lambda now: now("cellserve_store_errors_total", reason="away") >= 1)
        assert ("cellserve_sessions", frozenset()) not in scrape.values  # nobody knows
    own_redis.start()
    assert server.stop() == 0


def answering(server: Server) -> None:
    """Waits until a worker answers."""
    until(lambda: httpx.get(f"{server.url}/readyz"))


def workers_of(server: Server) -> set[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return {int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()}


def test_metrics_need_an_operators_key_or_the_operations_port(repository: Path, serve: Serve, tmp_path: Path) -> None:
    file, port = tmp_path / "keys.txt", free_port()
    alice, ops = new_key("alice", file), new_key("ops", file)
    flags = "--api-keys-file", str(file), "--operators", "root,ops"
    with serve("--models", str(repository), *flags).client() as client:
        as_json = {"accept": "application/json"}
        assert client.get("/metrics").status_code == client.get("/metrics", headers=as_json).status_code == 401
        refused = client.get("/metrics", headers={**as_json, **bearer(alice)})
        assert (refused.status_code, refused.json()["type"]) == (403, "urn:cellserve:problem:not-an-operator")
        scrape = Scrape(client, headers=bearer(ops))
        assert scrape("cellserve_problems_total", surface="operations", problem="not-an-operator") == 1
    both = (*flags, "--operations-port", str(port))
    server = serve("--models", str(repository), *both)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        Scrape(client)
        assert [client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
        assert [client.get(path).status_code for path in ("/models", "/sessions", "/docs")] == [404, 404, 404]
        failed = run("serve", "--port", "0", "--models", str(repository), *both)
        last = failed.stderr.splitlines()[-1]
        assert (failed.returncode, last) == (1, f"cellserve serve: --operations-port {port}: Address already in use")
        assert server.stop() == 0
        with pytest.raises(httpx.TransportError):
            client.get("/healthz")


def test_a_request_id_is_returned_by_every_protocol(server: Server) -> None:
    x, given = frames(1)[0], {"x-request-id": "0f/a:b~"}
    with server.client() as client:
        session = create(client, "lstm")
        for method, path, body in (
            ("POST", "/predict", {"model": "lstm", "sequences": [[x]]}), ("GET", "/models", None),
            ("POST", f"/sessions/{session}/step", {"x": x}), ("GET", "/metrics", None),
            ("POST", f"/sessions/{session}/reset", {}), ("GET", "/nothing", None),
        ):  # fmt: skip
            for id_ in (given, {"x-request-id": "a" * 128}):
                answer = client.request(method, path, json=body, headers=id_)
                assert answer.headers["x-request-id"] == id_["x-request-id"]
        made = [client.get("/models").headers["x-request-id"] for _ in range(2)]
        assert len(set(made)) == 2
        for bad in (b"", b"two words", b"a" * 129, "é".encode()):
            answer = client.get("/models", headers=[(b"x-request-id", bad)])
            assert re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", answer.headers["x-request-id"])
        bad_requests: dict[str, Any] = {
            "/predict": {"model": "lstm", "sequences": []},
            f"/sessions/{session}/step": {"x": []},
        }
        for path, bad_body in bad_requests.items():
            problem = client.post(path, json=bad_body, headers=given)
            assert (problem.status_code, problem.json()["request_id"]) == (422, "0f/a:b~")
            problem = client.post(path, json=bad_body)
            assert problem.json()["request_id"] == problem.headers["x-request-id"]
    with connect(server.url.replace("http", "ws") + "/stream", additional_headers=given) as stream:
        assert stream.response is not None
        assert stream.response.headers["x-request-id"] == "0f/a:b~"
        assert ask(stream, op="attach", session="none")["problem"]["request_id"] == "0f/a:b~"


def test_a_problem_found_in_a_tick_carries_the_request_id(server: Server) -> None:
    with server.client() as client, connect(server.url.replace("http", "ws") + "/stream") as stream:
        (state,) = client.get("/models/rnn").json()["signature"]["states"]
        draw = np.random.default_rng(0)
        for _ in range(1000):  # until x and the state overflow to infinities whose sum is none
            x, h = (np.float32(3e38) * draw.choice((-1, 1), size) for size in (5, state["shape"][0]))
            body = {"model": "rnn", "states": {state["name"]: h.tolist()}}
            session = client.post("/sessions", json=body).json()["session"]
            answer = client.post(f"/sessions/{session}/step", json={"x": x.tolist()})
            if answer.status_code != 200:
                break
        assert answer.json()["type"] == "urn:cellserve:problem:not-finite"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert stream.response is not None
        problem = ask(stream, op="step", session=session, x=x.tolist())["problem"]
        assert problem["request_id"] == stream.response.headers["x-request-id"]


def test_the_log_is_json_without_keys_and_payloads(repository: Path, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    key = new_key("alice", file)
    server = serve(
        "--models", str(repository), "--log-format", "json", "--access-log", "true", "--api-keys-file", str(file)
    )
    with server.client(headers=bearer(key)) as client:
        session = create(client, "lstm")
        client.post(f"/sessions/{session}/step", json={"x": [0.123456789] * 5}, headers={"x-request-id": "mine"})
        client.post("/predict", json={"model": "lstm", "sequences": [[["secret"]]]})
        client.get("/bad%0Aline")
        client.get("/models", headers={"authorization": "Bearer wrong"})
    with connect(server.url.replace("http", "ws") + "/stream", additional_headers=bearer(key)) as stream:
        ask(stream, op="attach", session=session)
    assert server.stop() == 0
    text = "".join(server.log)
    lines = [json.loads(line) for line in text.splitlines()]
    for secret in (key, "wrong", "0.123", "secret", session, "Bearer"):
        assert secret not in text
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    access = [line for line in lines if line["logger"] == "cellserve.access"]
    assert [(line["method"], line["path"], line["status"], line["owner"]) for line in access] == [
        ("POST", "/sessions", 201, "alice"),
        ("POST", "/sessions/{id}/step", 200, "alice"),
        ("POST", "/predict", 422, "alice"),
        ("GET", "/bad\\nline", 404, "alice"),
        ("GET", "/models", 401, ""),
        ("WS", "/stream", 101, "alice"),
    ]
    assert access[1]["request_id"] == "mine"
    assert all(line["duration_ms"] > 0 for line in access)


def test_requests_are_logged_only_if_asked_for(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository))
    with server.client() as client:
        client.post(f"/sessions/{create(client, 'lstm')}/step", json={"x": [0.5] * 5})
        client.get("/models")
    with connect(server.url.replace("http", "ws") + "/stream"):
        pass
    assert server.stop() == 0
    lines = "".join(server.log).splitlines()
    assert not [
        line for line in lines if any(word in line for word in ("/sessions", "/models", "/stream", "connection"))
    ]


def test_a_boolean_setting_is_turned_on_by_its_bare_flag(repository: Path, serve: Serve) -> None:
    server = serve("--access-log", "--models", str(repository))
    with server.client() as client:
        client.get("/models")
    with connect(server.url.replace("http", "ws") + "/stream"):
        pass
    assert server.stop() == 0
    assert "GET /models 200" in "".join(server.log) and "WS /stream 101" in "".join(server.log)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Takes traces over OTLP and HTTP, as an OpenTelemetry collector does; gives its address and the spans."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()
    thread.join()


def test_traces_show_requests_and_their_stages(
    repository: Path, serve: Serve, own_redis: RedisServer, collector: tuple[str, list[Any]]
) -> None:
    address, spans = collector
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
    server = serve("--models", str(repository), "--store", own_redis.url, "--tracing", "true", environment=environment)
    parent = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
    with server.client() as client:
        session = create(client, "lstm")
        client.post(f"/sessions/{session}/step", json={"x": [0.5] * 5}, headers={**parent, "x-request-id": "mine"})
        client.post("/predict", json={"model": "lstm", "sequences": frames_of(3)}, headers=parent)
    with connect(server.url.replace("http", "ws") + "/stream", additional_headers=parent) as stream:
        ask(stream, op="attach", session=session)
        ask(stream, op="step", session=0, x=[0.5] * 5)
    assert server.stop() == 0  # sends what there is
    roots = {span.name: span for span in spans if span.kind == 2}
    assert roots.keys() == {"POST /sessions", "POST /sessions/{id}/step", "POST /predict", "WS /stream frame"}
    for name in roots.keys() - {"POST /sessions"}:
        assert (roots[name].trace_id.hex(), roots[name].parent_span_id.hex()) == (TRACE, SPAN)
    attributes = {one.key: one.value for one in roots["POST /sessions/{id}/step"].attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["cellserve.request_id"].string_value == "mine"

    def below(name: str) -> list[str]:
        own = sorted((span for span in spans if span.parent_span_id == roots[name].span_id), key=start)
        assert all(start(span) <= span.end_time_unix_nano for span in own)
        return [span.name for span in own]

    def start(span: Any) -> int:
        return int(span.start_time_unix_nano)

    assert below("POST /sessions/{id}/step") == ["queue", "run", "store"]
    assert below("WS /stream frame") == ["queue", "run", "store"]
    assert set(below("POST /predict")) == {"queue", "run"}
    assert below("POST /sessions") == []


def frames_of(count: int) -> list[list[list[float]]]:
    return [frames(2) for _ in range(count)]


def test_the_docs_and_the_dashboard_name_existing_metrics(repository: Path, serve: Serve, tmp_path: Path) -> None:
    server = serve("--models", str(repository), "--store", f"lmdb:{tmp_path / 'store'}")  # it has the most of them
    with server.client() as client:
        create(client, "lstm")
        client.post("/predict", json={})
        families = Scrape(client).families
    named = {
        name + ("_total" if family.type == "counter" else ""): family.type
        for name, family in families.items()
        if not name.startswith("process_")
    }
    page = re.findall(r"^\| `(cellserve_\w+)` \| (\w+) \|", (ROOT / "docs/reference/operations.md").read_text(), re.M)
    assert dict(page) == named
    dashboard = json.loads((ROOT / "deploy/grafana/cellserve.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    used = {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"cellserve_\w+", " ".join(queries))}
    assert len(queries) > 10
    assert used <= named.keys()
    labels = {label for family in families.values() for sample in family.samples for label in sample.labels}
    for query in queries:
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert set(group.split(", ")) <= labels | {"instance"}, query  # Prometheus adds that one
