"""Who may, over every surface of a real server: keys and their revocation, wrong ones, origins, hosts, operators."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2_grpc
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.e2e.helpers import bearer, new_key
from tests.helpers import free_port, until
from tests.server import Server, start_server

ORIGIN = "https://app.example"
_asked = itertools.count()
WITHIN = 1.5  # seconds; the promise is one, and a busy machine is not the server's fault


class Guarded(NamedTuple):
    """A server with everything that guards it."""

    server: Server
    keys: Path
    operations: str  # the URL of its operations port

    def new_key(self) -> str:
        """A new key of alice; the server knows it."""
        key = new_key("alice", self.keys)
        with self.server.client(headers=bearer(key)) as client:

            def is_known() -> bool:
                # From another address each time: a key that is not known yet counts as a wrong one.
                elsewhere = {"x-forwarded-for": f"10.9.{next(_asked) >> 8}.{next(_asked) & 255}"}
                return client.get("/models", headers=elsewhere).status_code == 200

            until(is_known)
        return key

    def revoke(self, key: str) -> None:
        """Takes the last line, which is the key's, out of the file."""
        self.keys.write_text("".join(self.keys.read_text().splitlines(keepends=True)[:-1]))


@pytest.fixture(scope="module")
def guarded(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    new_key("bob", keys)
    port = free_port()
    server = start_server(
        "--models", str(examples), "--api-keys-file", str(keys), "--operators", "bob", "--grpc-port", "0",
        "--operations-port", str(port), "--allowed-origins", ORIGIN, "--allowed-hosts", "api.example",
        "--trusted-proxies", "127.0.0.1", "--max-rollout-steps", "1000000",
        environment={"CELLSERVE_OPERATOR": "bob"},
    )  # fmt: skip
    yield Guarded(server, keys, f"http://127.0.0.1:{port}")
    assert server.stop() == 0
    log = "".join(server.log)
    assert "CELLSERVE_OPERATOR is not a setting: did you mean CELLSERVE_OPERATORS?" in log
    assert "ERROR" not in log and "Traceback" not in log, log  # whatever a page does below


@pytest.fixture
def key(guarded: Guarded) -> str:
    return guarded.new_key()


def test_a_revoked_key_ends_its_socket_within_a_second(guarded: Guarded, key: str) -> None:
    url = guarded.server.url.replace("http", "ws") + "/stream"
    with connect(url) as stream:
        stream.send(json.dumps({"op": "auth", "key": key}))
        assert json.loads(stream.recv(timeout=10))["op"] == "auth"
        guarded.revoke(key)
        revoked = time.monotonic()
        told = json.loads(stream.recv(timeout=10))
        assert (told["problem"]["status"], told["problem"]["detail"]) == (
            401, "the key was revoked: send a valid one",
        )  # fmt: skip
        with pytest.raises(ConnectionClosed) as closed:
            stream.recv(timeout=10)
        assert time.monotonic() - revoked < WITHIN
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


def test_a_socket_lives_as_long_as_the_last_key_that_it_sent(guarded: Guarded, key: str) -> None:
    url = guarded.server.url.replace("http", "ws") + "/stream"
    with connect(url, additional_headers=bearer(key)) as stream:
        lines = guarded.keys.read_text().splitlines(keepends=True)
        other = guarded.new_key()
        stream.send(json.dumps({"op": "auth", "key": other}))
        assert json.loads(stream.recv(timeout=10))["op"] == "auth"
        guarded.keys.write_text("".join([*lines[:-1], guarded.keys.read_text().splitlines(keepends=True)[-1]]))
        with pytest.raises(TimeoutError):
            stream.recv(timeout=WITHIN)
        guarded.revoke(other)
        assert json.loads(stream.recv(timeout=10))["problem"]["status"] == 401


def test_a_revoked_key_ends_its_event_stream_within_a_second(guarded: Guarded, key: str) -> None:
    with guarded.server.client(headers=bearer(key)) as client:
        session = client.post("/sessions", json={"model": "characters"}).json()["session"]
        body = {"x": [1], "steps": 1_000_000, "stream": True}
        last, revoked = b"", [0.0]

        def revoke() -> None:
            guarded.revoke(key)
            revoked[0] = time.monotonic()

        with client.stream("POST", f"/sessions/{session}/rollout", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            revoking = threading.Timer(0.3, revoke)
            revoking.start()
            for part in answer.iter_bytes():
                last = (last + part)[-2000:]
            assert time.monotonic() - revoked[0] < WITHIN
        revoking.join()
    assert b"event: problem" in last and b"the key was revoked" in last


def test_a_revoked_key_ends_its_grpc_stream_within_a_second(guarded: Guarded, key: str) -> None:
    async def ask() -> None:
        async with grpc.aio.insecure_channel(guarded.server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer(metadata=[("authorization", f"Bearer {key}")])
            await call.wait_for_connection()
            guarded.revoke(key)
            revoked = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await asyncio.wait_for(call.read(), 10)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert time.monotonic() - revoked < WITHIN

    asyncio.run(ask())


def test_wrong_keys_are_throttled_by_address_over_every_surface(guarded: Guarded, key: str) -> None:
    with guarded.server.client() as client:

        def asked(host: str, sent: str) -> httpx.Response:
            return client.get("/models", headers={**bearer(sent), "x-forwarded-for": host})

        statuses = [asked("10.0.0.1", f"wrong {number}").status_code for number in range(12)]
        assert statuses == [401] * 10 + [429] * 2
        refused = asked("10.0.0.1", key)  # a right guess too
        assert refused.json()["type"] == "urn:cellserve:problem:too-many-wrong-keys"
        assert 1 <= int(refused.headers["retry-after"]) <= 6
        assert asked("10.0.0.2", key).status_code == 200
        assert client.get("/models").status_code == 401  # no key is no wrong one
        attacker = {**bearer(key), "x-forwarded-for": "10.0.0.1"}
        infer = client.post("/v2/models/sunspots/infer", content=b"{}", headers=attacker)
        assert (infer.status_code, "retry-after" in infer.headers) == (429, True)
    url = guarded.server.url.replace("http", "ws") + "/stream"
    with pytest.raises(InvalidStatus) as closed, connect(url, additional_headers=attacker):
        pass
    assert closed.value.response.status_code == 429
    with connect(url, additional_headers={"x-forwarded-for": "10.0.0.1"}) as stream:
        stream.send(json.dumps({"op": "auth", "key": key}))
        assert json.loads(stream.recv(timeout=10))["problem"]["status"] == 429


def test_two_keys_are_none(guarded: Guarded, key: str) -> None:
    twice = [("authorization", f"Bearer {key}")] * 2
    with guarded.server.client() as client:
        for _ in range(2):  # on the fast path too
            body = {"model": "sunspots", "sequences": [[[0.0]]]}
            assert client.post("/predict", json=body, headers=twice[:1]).status_code == 200
            assert client.post("/predict", json=body, headers=twice).status_code == 401
    url = guarded.server.url.replace("http", "ws") + "/stream"
    with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=twice):
        pass
    assert refused.value.response.status_code == 401


def test_reflection_wants_a_key(guarded: Guarded, key: str) -> None:
    def services(channel: grpc.Channel) -> Any:
        return ProtoReflectionDescriptorDatabase(channel).get_services()

    with grpc.insecure_channel(guarded.server.grpc) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            services(channel)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as ambiguous:
            services(grpc.intercept_channel(channel, _WithKeys(key, key)))
        assert ambiguous.value.code() is grpc.StatusCode.UNAUTHENTICATED
        authorized = grpc.intercept_channel(channel, _WithKeys(key))
        assert "inference.GRPCInferenceService" in services(authorized)


class _WithKeys(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, *keys: str) -> None:
        self._metadata = [("authorization", f"Bearer {key}") for key in keys]

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(details._replace(metadata=self._metadata), requests)


def test_a_rebound_name_is_answered_421_everywhere(guarded: Guarded, key: str) -> None:
    step = {"x": [0.0]}
    for url in (guarded.server.url, guarded.operations):
        with httpx.Client(base_url=url, headers=bearer(key)) as client:
            for host, status in (("evil.example:8000", 421), ("api.example", 200), ("127.0.0.1", 200)):
                assert client.get("/healthz", headers={"host": host}).status_code == status
    with guarded.server.client(headers=bearer(key)) as client:
        body = {"model": "sunspots", "sequences": [[[0.0]]]}
        for _ in range(2):  # on the fast path too
            for host, status in (("evil.example", 421), ("api.example", 200)):
                answer = client.post("/predict", json=body, headers={"host": host})
                assert answer.status_code == status, answer.text
        assert client.post("/sessions/x/step", json=step, headers={"host": "evil.example"}).status_code == 421
        assert client.get("/v2", headers={"host": "evil.example"}).status_code == 421
    at = ("127.0.0.1", httpx.URL(guarded.server.url).port)
    with connect(f"ws://localhost:{at[1]}/stream", address=at, additional_headers=bearer(key)):
        pass
    with pytest.raises(InvalidStatus) as refused, connect(f"ws://evil.example:{at[1]}/stream", address=at):
        pass
    assert refused.value.response.status_code == 421


def test_pages_of_allowed_origins_use_the_server_over_http(guarded: Guarded, key: str) -> None:
    with guarded.server.client() as client:
        asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = client.options("/predict", headers={"origin": ORIGIN, **asking})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        assert "PUT" in preflight.headers["access-control-allow-methods"]
        refused = client.options("/predict", headers={"origin": "https://evil.example", **asking})
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
        body = {"model": "sunspots", "sequences": [[[0.0]]]}
        for _ in range(3):  # a key that is in use may take the fast path
            answer = client.post("/predict", json=body, headers={"origin": ORIGIN, **bearer(key)})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
            assert "Retry-After" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-origin" not in client.post("/predict", json=body, headers=bearer(key)).headers
        wrong = client.post("/sessions/none/step", json={}, headers={"origin": ORIGIN, **bearer(key)})
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (404, ORIGIN)


def test_pages_of_other_origins_change_nothing(guarded: Guarded, key: str) -> None:
    with guarded.server.client(headers={"origin": "https://evil.example", **bearer(key)}) as client:
        for method, path in (
            ("POST", "/v2/models/sunspots/infer"), ("POST", "/v2/repository/index"), ("POST", "/sessions/x/reset"),
            ("DELETE", "/sessions/x"),
        ):  # fmt: skip
            assert client.request(method, path).status_code == 403, path
        assert client.get("/models").status_code == 200
    for origin in ("https://evil.example", ORIGIN):  # the port of operators is for no page
        with httpx.Client(base_url=guarded.operations, headers={"origin": origin}) as client:
            assert client.post("/models/reload").status_code == 403
            assert "access-control-allow-origin" not in client.get("/metrics").headers


def test_origins_are_compared_with_the_scheme_that_a_trusted_proxy_names(guarded: Guarded, key: str) -> None:
    url = guarded.server.url.replace("http", "ws") + "/stream"
    own, https = guarded.server.url, guarded.server.url.replace("http", "https")
    headers = bearer(key)
    for origin, more in ((own, {}), (https, {"x-forwarded-proto": "https"})):
        with connect(url, origin=Origin(origin), additional_headers={**headers, **more}):
            pass
    for origin, more in ((https, {}), (own, {"x-forwarded-proto": "https"})):
        with (
            pytest.raises(InvalidStatus) as refused,
            connect(url, origin=Origin(origin), additional_headers={**headers, **more}),
        ):
            pass
        assert refused.value.response.status_code == 403


def test_what_operators_may_is_on_their_port_alone(guarded: Guarded) -> None:
    operator = new_key("bob", guarded.keys)
    time.sleep(1)
    with guarded.server.client(headers=bearer(operator)) as client:
        assert client.get("/healthz").status_code == client.get("/models").status_code == 200
        assert client.get("/metrics").status_code == 404
        reload = client.post("/models/reload")
        assert (reload.status_code, reload.headers["allow"]) == (405, "GET")
        assert not {"/metrics", "/models/reload"} & client.get("/openapi.json").json()["paths"].keys()
    with httpx.Client(base_url=guarded.operations) as client:
        assert client.get("/metrics").status_code == client.post("/models/reload").status_code == 200


def test_the_protocol_answers_health_as_kserves_client_reads_it_and_405_with_allow(guarded: Guarded, key: str) -> None:
    with guarded.server.client(headers=bearer(key)) as client:
        for path, told in (
            ("/v2/health/live", {"live": True}),
            ("/v2/health/ready", {"ready": True}),
            ("/v2/models/sunspots/ready", {"name": "sunspots", "ready": True}),
        ):
            answer = client.get(path)
            assert (answer.json(), answer.headers["content-type"]) == (told, "application/json")
        for method, path, allowed in (
            ("POST", "/v2/health/live", "GET"), ("DELETE", "/v2", "GET"), ("GET", "/v2/models/sunspots/infer", "POST"),
            ("GET", "/v2/repository/index", "POST"),
        ):  # fmt: skip
            answer = client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_null_states_are_none_as_the_schema_says(guarded: Guarded, key: str) -> None:
    with guarded.server.client(headers=bearer(key)) as client:
        schemas = client.get("/openapi.json").json()["paths"]
        for path, method in (("/sessions", "post"), ("/sessions/{session_id}", "put"), ("/predict", "post")):
            schema = schemas[path][method]["requestBody"]["content"]["application/json"]["schema"]
            assert "null" in schema["properties"]["states"]["type"]
        assert client.post("/sessions", json={"model": "sunspots", "states": None}).status_code == 201
        assert client.put("/sessions/null", json={"model": "sunspots", "states": None}).status_code == 201
        body = {"model": "sunspots", "sequences": [[[0.0]]] * 2, "states": None}
        assert client.post("/predict", json=body).status_code == 200
        assert client.post("/predict", json={**body, "states": [None, None]}).status_code == 200


def test_no_page_can_cause_an_error_in_the_log(guarded: Guarded, key: str) -> None:
    url = guarded.server.url.replace("http", "ws")
    for path in ("/stream", "/", "/v2", "/docs", "/stream/../x", "/stream?%00"):
        for headers in ({}, {"origin": "https://evil.example"}, {"host": "evil"}, bearer("wrong")):
            with pytest.raises((InvalidStatus, ConnectionClosed)), connect(url + path, additional_headers=headers) as s:
                s.send(b"\xff")
                s.send("\x00")
                s.recv(timeout=10)
                s.recv(timeout=10)
    with guarded.server.client() as client:
        for path in (
            "/", "/nothing", "/sessions/%00", "/models/%ff", "/v2/models/%ff/infer", "/static-offline-docs/x",
            "/static-offline-docs/%00", "/static-offline-docs/" + "a" * 5000, "/models/" + "a" * 5000,
        ):  # fmt: skip
            for method in ("GET", "POST", "OPTIONS", "HEAD"):
                client.request(method, path, headers={"origin": "https://evil.example"})
                client.request(method, path, headers=bearer(key))
    at = httpx.URL(guarded.server.url)
    for method, path in (
        ("POST", "/sessions"), ("PUT", "/sessions/a"), ("POST", "/sessions/a/reset"), ("PUT", "/sessions/a/state"),
        ("POST", "/sessions/a/step"), ("POST", "/sessions/a/rollout"), ("POST", "/predict"),
        ("POST", "/v2/models/sunspots/infer"), ("POST", "/v2/repository/index"),
    ):  # fmt: skip
        with socket.create_connection((at.host, at.port or 0)) as leaving:
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
            leaving.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode())
            time.sleep(0.1)
