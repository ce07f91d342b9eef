"""Triton's own clients, unchanged, against a real server: what they ask works, and the bits are those of /predict."""

from __future__ import annotations

import asyncio
import json
import queue
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.e2e.helpers import bearer, is_busy, new_key
from tests.helpers import FEATURES, OUTPUTS, ROOT, free_port, until
from tests.redis_server import RedisServer
from tests.server import Serve, Server, start_server
from tests.triton import CLIENTS, GRPC, HTTP, noise, predicted, triton


@pytest.fixture(scope="module")
def both(repository: Path) -> Iterator[Server]:
    """A server that speaks HTTP and gRPC."""
    server = start_server("--models", str(repository), "--grpc-port", "0")
    yield server
    assert server.stop() == 0


def as_dict(told: Any) -> Any:
    """Gives what a client tells as JSON would have it."""
    if isinstance(told, dict | list):
        return told
    return MessageToDict(told, preserving_proto_field_name=True)


@pytest.mark.parametrize("kind", CLIENTS)
def test_a_client_discovers_servers_and_models(both: Server, kind: str) -> None:
    async def ask() -> None:
        async with triton(kind, both) as client:
            for question in ("is_server_live", "is_server_ready"):
                assert await client.call(question)
            assert [await client.call("is_model_ready", *of) for of in (("lstm",), ("lstm", "1"), ("lstn",))] == [
                True, True, False,
            ]  # fmt: skip
            server = as_dict(await client.call("get_server_metadata"))
            assert {"sequence", "sequence(string_id)", "binary_tensor_data", "statistics"} <= set(server["extensions"])
            model = as_dict(await client.call("get_model_metadata", "lstm"))
            tensors = {
                tensor["name"]: (tensor["datatype"], list(map(int, tensor["shape"]))) for tensor in model["inputs"]
            }
            assert tensors == {"x": ("FP32", [-1, -1, FEATURES])}  # and no state
            assert [tensor["name"] for tensor in model["outputs"]] == ["y"]
            config = as_dict(await client.call("get_model_config", "lstm"))
            config = config.get("config", config)
            assert "sequence_batching" in config
            assert [tensor["name"] for tensor in config["input"]] == ["x"]
            assert int(config["max_batch_size"]) > 1
            index = as_dict(await client.call("get_model_repository_index"))
            models = index if isinstance(index, list) else index["models"]
            assert {model["name"] for model in models if model["state"] == "READY"} == {"lstm", "rnn", "decaying"}
            with pytest.raises(InferenceServerException, match="not loaded or unloaded over this protocol"):
                await client.call("load_model", "lstm")

    asyncio.run(ask())


@pytest.mark.parametrize("kind", CLIENTS)
def test_whole_sequences_give_the_bits_of_predict(both: Server, kind: str) -> None:
    x = noise(5, 40, FEATURES)
    lengths = np.array([40, 1, 7, 39, 33], np.int32)

    async def ask() -> None:
        async with triton(kind, both) as client:
            for model in ("lstm", "rnn", "decaying"):
                whole = predicted(both, model, x)
                answer = await client.infer(model, x, request_id="mine")
                assert answer.y.dtype == np.float32
                assert np.array_equal(answer.y, whole)
                told = as_dict(answer.response)
                assert (told["id"], told["model_name"], told["model_version"]) == ("mine", model, "1")
                padded = await client.infer(model, x, client.input(lengths, "lengths", "INT32"))
                for row, length in enumerate(lengths):
                    assert np.array_equal(padded.y[row, :length], whole[row, :length])
                    assert not padded.y[row, length:].any()
                single = await client.infer(model, x[:, 0])
                assert single.y.shape == (5, OUTPUTS)
                assert np.array_equal(single.y, whole[:, 0])

    asyncio.run(ask())


@pytest.mark.parametrize("kind", HTTP[:2])
@pytest.mark.parametrize("sent", [None, "gzip", "deflate"])
@pytest.mark.parametrize("wanted", [None, "gzip", "deflate"])
def test_bodies_are_compressed_as_requested(both: Server, kind: str, sent: str | None, wanted: str | None) -> None:
    x = noise(2, 200, FEATURES)

    async def ask() -> None:
        async with triton(kind, both) as client:
            how = {"request_compression_algorithm": sent, "response_compression_algorithm": wanted}
            assert np.array_equal((await client.infer("rnn", x, **how)).y, predicted(both, "rnn", x))

    asyncio.run(ask())
    with both.client() as client:
        body = {"inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.tolist()}]}
        headers = {"accept-encoding": wanted or "identity"}
        answer = client.post("/v2/models/rnn/infer", json=body, headers=headers)
        assert answer.headers.get("content-encoding") == wanted
        assert np.array_equal(np.float32(answer.json()["outputs"][0]["data"]), predicted(both, "rnn", x).ravel())


@pytest.mark.parametrize("how", [None, "gzip", "deflate"])
def test_grpc_messages_may_be_compressed(both: Server, how: str | None) -> None:
    x = noise(2, 200, FEATURES)

    async def ask() -> None:
        async with triton("grpc", both) as client:
            answer = await client.infer("rnn", x, compression_algorithm=how)
            assert np.array_equal(answer.y, predicted(both, "rnn", x))

    asyncio.run(ask())


def test_tensors_may_be_typed_over_grpc_and_raw_over_http(both: Server) -> None:
    x = noise(1, 9, FEATURES)
    request = service_pb2.ModelInferRequest(model_name="lstm")
    request.inputs.add(name="x", datatype="FP32", shape=x.shape).contents.fp32_contents.extend(x.ravel().tolist())
    with grpc.insecure_channel(both.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    whole = predicted(both, "lstm", x)
    assert answer.raw_output_contents[0] == whole.tobytes()
    with both.client() as client:
        headers = {"inference-header-content-length": "0"}
        raw = client.post("/v2/models/lstm/infer", content=x.tobytes(), headers=headers)
    assert raw.content[int(raw.headers["inference-header-content-length"]) :] == whole.tobytes()


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("sequence", [17, 2**63 - 1, "a-string.of_mine~1"])
def test_a_sequence_in_any_chunks_is_one_run_and_a_session(both: Server, kind: str, sequence: int | str) -> None:
    drawn = random.Random(f"{kind} {sequence}")
    x = noise(1, 60, FEATURES, seed=drawn.randrange(100))

    async def ask() -> None:
        async with triton(kind, both) as client:
            ys, position = [], 0
            while position < 60:
                chunk = x[:, position : position + drawn.choice((1, 1, 1, 5, 13))]
                one = chunk.shape[1] == 1 and drawn.random() < 0.5
                start, end = position == 0, position + chunk.shape[1] == 60
                how = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
                answer = await client.infer("lstm", chunk[:, 0] if one else chunk, **how)
                position += chunk.shape[1]
                assert (answer.parameters["position"], answer.parameters["sequence_id"]) == (position, sequence)
                ys.append(answer.y[:, None] if one else answer.y)
                with both.client() as sessions:
                    told = sessions.get(f"/sessions/{answer.parameters['session']}")
                    assert answer.parameters["session"] == f"lstm~{sequence}"
                    assert told.json()["position"] == position if not end else told.status_code == 410
            assert np.array_equal(np.concatenate(ys, axis=1), predicted(both, "lstm", x))

    asyncio.run(ask())


def test_sequences_of_one_id_are_separate_in_two_models(both: Server) -> None:
    x = noise(1, 6, FEATURES)

    async def ask() -> None:
        async with triton("http", both) as client:
            for step in range(6):
                for model in ("lstm", "rnn"):
                    answer = await client.infer(model, x[:, step], sequence_id=3, sequence_start=step == 0)
                    assert np.array_equal(answer.y, predicted(both, model, x)[:, step])

    asyncio.run(ask())


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_sequence_start_replaces_an_existing_sequence(both: Server, kind: str) -> None:
    x = noise(1, 4, FEATURES)
    first = predicted(both, "rnn", x)[:, 0]

    async def ask() -> None:
        async with triton(kind, both) as client:
            for end in (False, False, True, True, False):  # after nothing, live ones, ended ones
                answer = await client.infer("rnn", x[:, 0], sequence_id=8, sequence_start=True, sequence_end=end)
                assert np.array_equal(answer.y, first)
                assert answer.parameters["position"] == 1
            again = await client.infer("rnn", x[:, 1], sequence_id=8)
            assert np.array_equal(again.y, predicted(both, "rnn", x)[:, 1])

    asyncio.run(ask())


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_missing_and_unstarted_sequences_are_refused(both: Server, kind: str) -> None:
    x = noise(2, 1, FEATURES)

    async def refused(client: Any, told: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(InferenceServerException, match=told) as error:
            await client.infer("rnn", *arguments, **options)
        assert error.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")

    async def ask() -> None:
        async with triton(kind, both) as client:
            await refused(client, "send sequence_start", x[:1], sequence_id=123456)
            await refused(client, "a batch of 1", x, sequence_id=5, sequence_start=True)
            lengths = client.input(np.array([1], np.int32), "lengths", "INT32")
            await refused(client, "a batch of 1", x[:1], lengths, sequence_id=5, sequence_start=True)
            await refused(client, "is not allowed", x[:1], sequence_id="no/slash", sequence_start=True)
            await refused(client, "need one", x[:1], parameters={"position": 3})
            await refused(client, "starts at 0", x[:1], sequence_id=5, sequence_start=True, parameters={"position": 3})
            await refused(client, "position: send", x[:1], sequence_id=5, parameters={"position": "3"})
            for nobody in (0, ""):
                assert (await client.infer("rnn", x, sequence_id=nobody, sequence_start=True)).parameters == {}

    asyncio.run(ask())


@pytest.mark.parametrize("kind", CLIENTS)
def test_requests_with_a_position_can_be_repeated(both: Server, kind: str) -> None:
    x = noise(1, 3, FEATURES)
    whole = predicted(both, "decaying", x)

    async def ask() -> None:
        async with triton(kind, both) as client:
            sequence = f"again-{kind.replace(', ', '-')}"
            for step in range(3):
                for attempt in range(3):
                    answer = await client.infer(
                        "decaying", x[:, step], sequence_id=sequence, sequence_start=step == 0,
                        parameters={"position": step},
                    )  # fmt: skip
                    assert np.array_equal(answer.y, whole[:, step])
                    assert (answer.parameters["position"], answer.parameters["replayed"]) == (step + 1, attempt > 0)
            for other, start, position in ((x[:, 1], True, 0), (x[:, 0], False, 1), (x[:, 0], False, 9)):
                with pytest.raises(InferenceServerException, match="the session is at 3") as error:
                    await client.infer(
                        "decaying", other, sequence_id=sequence, sequence_start=start, parameters={"position": position}
                    )
                assert error.value.status() in ("409", "StatusCode.ABORTED")
            # Over another surface it is the same request.
            with both.client() as sessions:
                body = {"x": x[0, 2].tolist(), "position": 2}
                replay = sessions.post(f"/sessions/decaying~{sequence}/step", json=body)
                assert replay.headers["idempotent-replay"] == "true"
            # What was ended stays ended for a start that is to be safe to repeat.
            end = {"sequence_id": sequence, "parameters": {"position": 3}}
            await client.infer("decaying", x[:, 0], sequence_end=True, **end)
            for start, position in ((False, 3), (True, 0)):
                with pytest.raises(InferenceServerException, match="was ended at position 4") as error:
                    await client.infer(
                        "decaying",
                        x[:, 0],
                        sequence_id=sequence,
                        sequence_start=start,
                        parameters={"position": position},
                    )
                assert error.value.status() in ("410", "StatusCode.FAILED_PRECONDITION")

    asyncio.run(ask())


@pytest.mark.parametrize("kind", GRPC)
def test_sequences_over_one_stream_keep_their_order(both: Server, kind: str) -> None:
    sequences, steps = [1, 2, "three"], 30
    x = noise(3, steps, FEATURES)
    whole = predicted(both, "lstm", x)
    order = [(row, step) for step in range(steps) for row in range(3)]

    def request(client: Any, row: int, step: int) -> dict[str, Any]:
        return {
            "model_name": "lstm",
            "inputs": [client.input(x[row : row + 1, step])],
            "request_id": f"{row} {step}",
            "sequence_id": sequences[row],
            "sequence_start": step == 0,
            "sequence_end": step == steps - 1,
        }

    async def ask() -> list[Any]:
        async with triton(kind, both) as client:
            results: list[Any] = []
            if kind == "grpc":
                came: queue.Queue[Any] = queue.Queue()
                client.plain.start_stream(lambda result, error: came.put((result, error)))
                for row, step in order:
                    client.plain.async_stream_infer(**request(client, row, step), enable_empty_final_response=True)
                results = [came.get(timeout=30) for _ in order]
                client.plain.stop_stream()
            else:

                async def requests() -> AsyncIterator[dict[str, Any]]:
                    for row, step in order:
                        yield {**request(client, row, step), "enable_empty_final_response": True}

                results = [told async for told in client.plain.stream_infer(requests())]
            return results

    results = asyncio.run(ask())
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    assert len(results) == len(order)
    for result, error in results:
        assert error is None
        response = result.get_response()
        row, step = map(int, response.id.split())
        seen[row].append(step)
        assert np.array_equal(result.as_numpy("y"), whole[row : row + 1, step])
        assert response.parameters["triton_final_response"].bool_param
    assert list(seen.values()) == [list(range(steps))] * 3


def test_a_stream_continues_after_a_bad_request(both: Server) -> None:
    x = noise(1, 2, FEATURES)

    async def ask() -> None:
        async with triton("grpc", both) as client:
            came: queue.Queue[Any] = queue.Queue()
            client.plain.start_stream(lambda result, error: came.put((result, error)))
            for model, sequence in (("rnn", 404), ("nobody", 0), ("rnn", 0)):
                client.plain.async_stream_infer(model, [client.input(x)], sequence_id=sequence)
            told = [came.get(timeout=30) for _ in range(3)]
            client.plain.stop_stream()
            assert sorted(str(error)[:40] for _, error in told if error) == [
                "model: there is no model 'nobody': send one of"[:40],
                "sequence '404' of model 'rnn' is unknown: send"[:40],
            ]
            assert [
                np.array_equal(result.as_numpy("y"), predicted(both, "rnn", x)) for result, _ in told if result
            ] == [True]

    asyncio.run(ask())


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_statistics_count_requests_and_runs(repository: Path, serve: Serve, kind: str) -> None:
    server = serve("--models", str(repository), "--grpc-port", "0")
    x = noise(4, 3, FEATURES)

    async def ask() -> dict[str, Any]:
        async with triton(kind, server) as client:
            for _ in range(5):
                await client.infer("lstm", x)
            await client.infer("lstm", x[:1, 0], sequence_id=1, sequence_start=True)
            with pytest.raises(InferenceServerException):
                await client.infer("lstm", noise(1, 1, FEATURES + 1))
            every = as_dict(await client.call("get_inference_statistics"))["model_stats"]
            assert {model["name"] for model in every} == {"lstm", "rnn", "decaying"}
            (told,) = as_dict(await client.call("get_inference_statistics", "lstm"))["model_stats"]
            with server.client() as metrics:
                told_there = metrics.get("/metrics").text
            assert 'cellserve_problems_total{problem="invalid-input",surface="inference"} 1.0' in told_there
            assert re.search(r'request_duration_seconds_count\{surface="inference"\} (8|9)\.0', told_there)
            return dict(told)

    told = asyncio.run(ask())
    stages = told["inference_stats"]
    assert (int(told["inference_count"]), int(stages["success"]["count"]), int(stages["fail"]["count"])) == (21, 6, 1)
    assert abs(int(told["last_inference"]) / 1000 - time.time()) < 60
    parts = [int(stages[stage].get("ns", 0)) for stage in ("queue", "compute_input", "compute_infer", "compute_output")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == int(stages["success"]["ns"])
    assert sum(int(batch["compute_infer"]["count"]) for batch in told["batch_stats"]) == int(told["execution_count"])


@pytest.mark.parametrize("store", ["lmdb", "redis"])
def test_a_sequence_continues_after_a_restart(
    repository: Path, serve: Serve, tmp_path: Path, redis: RedisServer, store: str
) -> None:
    where = redis.url if store == "redis" else f"lmdb:{tmp_path / 'store'}"
    flags = "--models", str(repository), "--grpc-port", "0", "--store", where
    x = noise(1, 20, FEATURES)
    ys = []
    for half, kind in enumerate(("http", "grpc")):
        server = serve(*flags)

        async def ask(server: Server = server, half: int = half, kind: str = kind) -> None:
            async with triton(kind, server) as client:
                for step in range(10 * half, 10 * half + 10):
                    for _ in range(2):
                        answer = await client.infer(
                            "lstm",
                            x[:, step],
                            sequence_id=2**40,
                            sequence_start=step == 0,
                            parameters={"position": step},
                        )
                    ys.append(answer.y)
                    assert answer.parameters["durable"] == ("store" if store == "redis" else "process")

        asyncio.run(ask())
        whole = predicted(server, "lstm", x)
        assert server.stop() == 0
    assert np.array_equal(np.stack(ys, axis=1), whole)


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_an_expired_sequence_is_answered_as_expired_and_may_start_again(
    repository: Path, serve: Serve, redis: RedisServer, store: str
) -> None:
    redis.flush()
    where = ("--store", redis.url) if store == "redis" else ()
    server = serve("--models", str(repository), "--grpc-port", "0", "--session-idle-seconds", "1", *where)
    x = noise(1, 3, FEATURES)

    def has_ended() -> bool:
        return not httpx.get(f"{server.url}/sessions").json()["sessions"]

    async def ask() -> None:
        async with triton("http", server) as http, triton("grpc", server) as over_grpc:
            for client, statuses in ((http, "410"), (over_grpc, "StatusCode.FAILED_PRECONDITION")):
                await client.infer("rnn", x[:, :2], sequence_id=61, sequence_start=True)
                await asyncio.to_thread(until, has_ended)
                with pytest.raises(InferenceServerException, match="expired at position 2") as error:
                    await client.infer("rnn", x[:, 2], sequence_id=61)
                assert error.value.status() == statuses
                answer = await client.infer("rnn", x, sequence_id=61, sequence_start=True)
                assert np.array_equal(answer.y, predicted(server, "rnn", x))

    asyncio.run(ask())


def test_two_servers_over_one_store_serve_a_sequence_in_turn(
    repository: Path, serve: Serve, redis: RedisServer
) -> None:
    servers = [serve("--models", str(repository), "--store", redis.url) for _ in range(2)]
    x = noise(1, 12, FEATURES)

    async def ask() -> None:
        async with triton("http", servers[0]) as one, triton("http", servers[1]) as other:
            for round in range(3):  # a start on a live sequence of the other's, and on an ended one
                for step in range(12):
                    answer = await (one, other)[(round + step) % 2].infer(
                        "lstm", x[:, step], sequence_id=77, sequence_start=step == 0,
                        sequence_end=round == 1 and step == 11,
                    )  # fmt: skip
                    assert np.array_equal(answer.y, predicted(servers[0], "lstm", x)[:, step])
                    assert answer.parameters["position"] == step + 1

    asyncio.run(ask())


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_racing_requests_of_one_sequence_are_all_answered_and_leave_nothing_behind(
    repository: Path, serve: Serve, redis: RedisServer, store: str
) -> None:
    where = ("--store", redis.url) if store == "redis" else ()
    server = serve("--models", str(repository), *where)
    drawn, x = random.Random(1), noise(1, 3, FEATURES)

    async def one(client: httpx.AsyncClient) -> int:
        position = {"position": drawn.choice((0, 0, 1, 3))} if drawn.random() < 0.3 else {}
        start = drawn.random() < 0.4 and position.get("position", 0) == 0
        flags = {"sequence_start": start, "sequence_end": drawn.random() < 0.2, **position}
        steps = drawn.choice((1, 3))
        tensor = {"name": "x", "shape": (1, steps, FEATURES), "datatype": "FP32", "data": x[:, :steps].ravel().tolist()}
        body = {"inputs": [tensor], "parameters": {"sequence_id": f"race-{store}", **flags}}
        answer = await client.post("/v2/models/lstm/infer", json=body)
        assert answer.status_code in (200, 400, 409, 410), answer.text
        return answer.status_code

    async def ask() -> None:
        async with server.async_client(timeout=30) as client:
            statuses = await asyncio.gather(*(one(client) for _ in range(200)))
            assert {200, 409} <= set(statuses)
            async with triton("http", server) as last:
                answer = await last.infer(
                    "lstm", x, sequence_id=f"race-{store}", sequence_start=True, sequence_end=True
                )
                assert np.array_equal(answer.y, predicted(server, "lstm", x))
            listed = (await client.get("/sessions")).json()["sessions"]
            assert not [session for session in listed if session["session"] == f"lstm~race-{store}"]

    asyncio.run(ask())
    assert server.stop() == 0


@pytest.mark.parametrize("kind", CLIENTS)
def test_keys_are_required_and_sequences_belong_to_their_owner(
    repository: Path, serve: Serve, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "keys"
    alice, bob = (new_key(owner, file) for owner in ("alice", "bob"))
    server = serve("--models", str(repository), "--grpc-port", "0", "--api-keys-file", str(file))
    x = noise(1, 1, FEATURES)

    async def ask() -> None:
        async with triton(kind, server) as nobody:
            assert await nobody.call("is_server_live")
            for question in (
                nobody.call("get_server_metadata"), nobody.call("get_model_metadata", "lstm"),
                nobody.call("get_inference_statistics"), nobody.infer("lstm", x),
            ):  # fmt: skip
                with pytest.raises(InferenceServerException, match="needs a key") as error:
                    await question
                assert error.value.status() in ("401", "StatusCode.UNAUTHENTICATED")
        async with triton(kind, server, bearer(alice)) as one, triton(kind, server, bearer(bob)) as other:
            await one.infer("lstm", x, sequence_id=5, sequence_start=True)
            with pytest.raises(InferenceServerException, match="unknown"):
                await other.infer("lstm", x, sequence_id=5)
            assert (await one.infer("lstm", x, sequence_id=5)).parameters["position"] == 2

    asyncio.run(ask())


def test_health_and_reflection_are_served(both: Server) -> None:
    with grpc.insecure_channel(both.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            assert (
                stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
            )
        assert "inference.GRPCInferenceService" in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_a_stopping_server_answers_pending_requests_and_ends_idle_streams(repository: Path, serve: Serve) -> None:
    server = serve("--models", str(repository), "--grpc-port", "0", "--shutdown-seconds", "60")
    x = noise(16, 4000, FEATURES)
    answers: list[Any] = []

    async def ask() -> None:
        async with triton("grpc", server) as client:
            channel = grpc.insecure_channel(server.grpc)
            client.plain.start_stream(lambda result, error: answers.append((result, error)))
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
            client.plain.async_stream_infer("decaying", [client.input(x)])
            with server.client() as http:
                await asyncio.to_thread(until, lambda: answers or is_busy(http))
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(
                server.process.wait, timeout=60
            )  # although the stream is open, and the health is watched
            client.plain.stop_stream()
            channel.close()

    asyncio.run(ask())
    assert server.stop() == 0
    assert [result.as_numpy("y").shape for result, _ in answers if result] == [(16, 4000, OUTPUTS)]


def test_the_port_is_served_without_uvloop_too(repository: Path, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError")
    paths = {"PYTHONPATH": str(tmp_path)}
    server = serve("--models", str(repository), "--grpc-port", "0", environment=paths, fresh=True)
    assert "uvloop" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    x = noise(64, 500, FEATURES)  # more than the sockets on the way hold, and so is the answer

    async def ask() -> None:
        async with triton("grpc", server) as client:
            assert np.array_equal((await client.infer("lstm", x)).y, predicted(server, "lstm", x))

    asyncio.run(ask())
    with grpc.insecure_channel(server.grpc) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest(), timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError):
            check(health_pb2.HealthCheckRequest(), timeout=60, metadata=[(f"x-{n}", "v") for n in range(160)])
    assert server.stop() == 0


@pytest.mark.long
def test_workers_share_the_grpc_port(repository: Path, serve: Serve, redis: RedisServer) -> None:
    port = free_port()
    server = serve("--models", str(repository), "--store", redis.url, "--workers", "2", "--grpc-port", str(port))
    x = noise(1, 10, FEATURES)

    def up() -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                return bool(stub.Check(health_pb2.HealthCheckRequest()).status)
            except grpc.RpcError:
                return False

    until(up)
    server.log.append(f"gRPC on 127.0.0.1:{port}")

    async def ask() -> None:
        for step in range(10):
            async with triton("grpc", server) as client:  # a connection each, to whichever worker
                answer = await client.infer("lstm", x[:, step], sequence_id=9, sequence_start=step == 0)
                assert np.array_equal(answer.y, predicted(server, "lstm", x)[:, step])

    asyncio.run(ask())
    assert server.stop() == 0


def test_a_taken_grpc_port_and_missing_packages_are_reported_in_one_line(both: Server, repository: Path) -> None:
    port = both.grpc.rpartition(":")[2]
    command = ["serve", "--models", str(repository), "--port", "0", "--grpc-port"]
    hidden = "import sys; sys.modules['grpc'] = None; from cellserve.cli import main; sys.exit(main(sys.argv[1:]))"
    for start, wanted, told in (
        (["-m", "cellserve.cli"], port, f"--grpc-port {port}: Address already in use"),
        (["-c", hidden], "0", "in a clone, pip install '.[grpc]'"),
    ):
        done = subprocess.run([sys.executable, *start, *command, wanted], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert told in done.stderr.splitlines()[-1]


def test_the_examples_of_the_docs_run_over_grpc_too(examples: Path, serve: Serve) -> None:
    server = serve("--models", str(examples), "--grpc-port", "0")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reference/inference-protocol.md").read_text(), re.S)
    code = "\n".join(blocks).replace("tritonclient.http", "tritonclient.grpc")
    code = code.replace('"localhost:8000"', f'"{server.grpc}"').replace("http://localhost:8000", server.url)
    exec(code.replace('["parameters"]["replayed"]', '.parameters["replayed"]'), {})


def test_the_openapi_document_describes_every_path(both: Server) -> None:
    with both.client() as client:
        paths = json.loads(client.get("/openapi.json").text)["paths"]
    assert {"/v2", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/stats"} <= set(paths)
