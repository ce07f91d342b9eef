"""Nothing but bad requests in the Open Inference Protocol: the answers say what was wrong, and nobody else pays."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.helpers import FEATURES, OUTPUTS
from tests.server import Server, start_server
from tests.triton import noise

X = noise(1, 2, FEATURES)
INFER = "/v2/models/lstm/infer"
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def both(repository: Path) -> Iterator[Server]:
    """A server that speaks HTTP and gRPC, and takes bodies of a megabyte."""
    server = start_server("--models", str(repository), "--grpc-port", "0", "--max-body-bytes", str(2**20))
    yield server
    assert server.stop() == 0


def tensor(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "shape": X.shape, "datatype": "FP32", "data": X.ravel().tolist(), **fields}


def body(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs or (tensor(),)), **fields}).encode()


def numbers(*changed: Any) -> list[Any]:
    return [*changed, *X.ravel().tolist()[len(changed) :]]


def lengths(*data: int) -> dict[str, Any]:
    return tensor(name="lengths", shape=[len(data)], datatype="INT32", data=data)


def binary(content: bytes, length: int | str | None = None, **fields: Any) -> tuple[bytes, dict[str, str]]:
    described = tensor(parameters={"binary_data_size": len(content)}, **fields)
    del described["data"]
    head = body(described)
    return head + content, {LENGTH: str(len(head) if length is None else length)}


JSON: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "send a JSON document"),
    "not JSON": (b"{", 400, "send a JSON document"),
    "not an object": (b"[]", 400, "expected an object"),
    "no inputs": (b"{}", 400, "inputs"),
    "empty inputs": (b'{"inputs": []}', 400, "send x"),
    "another tensor": (body(tensor(name="z")), 400, "send x"),
    "a state": (body(tensor(), tensor(name="h0")), 400, "send x"),
    "twice": (body(tensor(), tensor()), 400, "twice"),
    "no data": (body({"name": "x", "shape": [1, 2, 5], "datatype": "FP32"}), 400, "send its data"),
    "another datatype": (body(tensor(datatype="FP64")), 400, "its datatype is 'FP64': send FP32, the model's"),
    "integers": (body(tensor(datatype="INT32", data=[1] * 10)), 400, "its datatype is 'INT32': send FP32"),
    "a string": (body(tensor(data=numbers("1"))), 400, "expected a number, got a string"),
    "a boolean": (body(tensor(data=numbers(True))), 400, "expected a number, got a boolean"),
    "null": (body(tensor(data=None)), 400, "expected an array"),
    "NaN": (body(tensor(data=numbers(0.5, float("nan")))), 400, "not a finite number"),
    "beyond float32": (body(tensor(data=numbers(0.5, 1e39))), 400, "x[0][0][1]: not a finite number"),
    "too few numbers": (body(tensor(data=[1.0])), 400, "1 numbers, where the shape [1, 2, 5] asks for 10"),
    "ragged": (body(tensor(data=[[1.0] * 5, [1.0] * 4])), 400, "nested evenly"),
    "deeply nested": (body(tensor(data=[[[[[[[[[[1.0]]]]]]]]]])), 400, "nested too deeply"),
    "very deeply nested": (body(tensor(data=7)).replace(b"7", b"[" * 100_000), 400, ""),
    "a negative shape": (body(tensor(shape=[-1, 2, 5])), 400, "its shape is"),
    "an enormous shape": (body(tensor(shape=[2**62, 2**62, 5])), 400, "asks for"),
    "an enormous shape of nothing": (body(tensor(shape=[0, 2**62, 5], data=[])), 400, "its shape is"),
    "many axes": (body(tensor(shape=[1] * 100)), 400, "its shape is"),
    "no batch": (body(tensor(shape=[0, 2, 5], data=[])), 400, "send [batch, time, 5]"),
    "other features": (body(tensor(shape=[1, 5, 2])), 400, "send [batch, time, 5]"),
    "one axis": (body(tensor(shape=[10])), 400, "send [batch, time, 5]"),
    "another output": (body(outputs=[{"name": "h"}]), 400, "request y"),
    "classes": (body(outputs=[{"name": "y", "parameters": {"classification": 2}}]), 400, "support classification"),
    "shared memory": (body(tensor(parameters={"shared_memory_region": "r"})), 400, "support shared_memory_region"),
    "binary without its bytes": (binary(X.tobytes())[0][:-40], 400, "0 bytes after"),
    "binary and data": (body(tensor(parameters={"binary_data_size": 0})), 400, "and no data"),
    "a flag that is none": (body(parameters={"binary_data_output": 1}), 400, "send true or false"),
    "a sequence that is none": (body(parameters={"sequence_id": 1.5}), 400, "an integer or a string"),
    "a negative sequence": (body(parameters={"sequence_id": -1}), 400, "an integer from 0"),
    "a large sequence": (body(parameters={"sequence_id": 2**64}), 400, ""),
    "a start of none": (body(parameters={"sequence_start": True}), 400, "sequence_id: missing"),
    "a start that is none": (body(parameters={"sequence_id": 1, "sequence_start": 1}), 400, "send true or false"),
    "short lengths": (body(tensor(), lengths(0)), 400, "from 1 to 2"),
    "long lengths": (body(tensor(), lengths(3)), 400, "from 1 to 2"),
    "lengths of more": (body(tensor(), lengths(1, 1)), 400, "shape [1]"),
    "large lengths": (body(tensor(), lengths(2**40)), 400, "INT32"),
    "many rows": (body(tensor(shape=[5000, 5], data=[0.5] * 25000)), 413, "a request may have 4096"),
    "too large": (b" " * (2**20 + 1), 413, "larger than"),
}  # fmt: skip

BINARY: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "too few bytes": (*binary(b"\0" * 36), 400, "36 bytes, where the shape [1, 2, 5] of FP32 asks for 40"),
    "too many bytes": (binary(X.tobytes())[0] + b"\0", binary(X.tobytes())[1], 400, "1 bytes after the JSON"),
    "NaN": (*binary(np.full(10, np.nan, np.float32).tobytes()), 400, "x[0][0][0]: not a finite number"),
    "infinity": (*binary(np.full(10, np.inf, np.float32).tobytes()), 400, "not a finite number"),
    "a length beyond the body": (*binary(X.tobytes(), 10**6), 400, "send the length of the JSON"),
    "an enormous length": (*binary(X.tobytes(), "9" * 5000), 400, "send the length of the JSON"),
    "a negative length": (*binary(X.tobytes(), -1), 400, "send the length of the JSON"),
    "a length that is none": (*binary(X.tobytes(), "many"), 400, "send the length of the JSON"),
    "a short length": (*binary(X.tobytes(), 7), 400, ""),
    "raw, not whole": (X.tobytes()[:-1], {LENGTH: "0"}, 400, "a time step's 20 bytes"),
    "raw, nothing": (b"", {LENGTH: "0"}, 400, "a time step's 20 bytes"),
    "a gzip bomb": (gzip.compress(b" " * (64 * 2**20)), {"content-encoding": "gzip"}, 413, "when decompressed"),
    "a deflate bomb": (zlib.compress(b" " * (64 * 2**20)), {"content-encoding": "deflate"}, 413, "when decompressed"),
    "no gzip": (body(), {"content-encoding": "gzip"}, 400, "cannot be decompressed"),
    "gzip cut off": (gzip.compress(body())[:-9], {"content-encoding": "gzip"}, 400, "truncated"),
    "gzip and more": (gzip.compress(body()) + b"more", {"content-encoding": "gzip"}, 400, "followed by"),
    "another encoding": (body(), {"content-encoding": "br"}, 415, "send gzip, deflate or neither"),
}


def check(server: Server, content: bytes, headers: dict[str, str], status: int, told: str) -> None:
    with server.client() as client:
        answer = client.post(INFER, content=content, headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
        assert told in answer.json()["error"]
        assert client.post(INFER, content=body()).status_code == 200


@pytest.mark.parametrize("case", JSON)
def test_a_bad_json_body_is_refused_with_the_reason(both: Server, case: str) -> None:
    content, status, told = JSON[case]
    check(both, content, {}, status, told)


@pytest.mark.parametrize("case", BINARY)
def test_bad_binary_data_is_refused_with_the_reason(both: Server, case: str) -> None:
    content, headers, status, told = BINARY[case]
    check(both, content, headers, status, told)


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("POST", "/v2/models/nobody/infer", 404, "send one of"),
        ("POST", "/v2/models/lstm/versions/2/infer", 404, "send one of 1"),
        ("GET", "/v2/models/nobody", 404, "send one of"),
        ("GET", "/v2/models/lstm/versions/x/config", 404, "send one of 1"),
        ("GET", "/v2/models/lstm/trace", 404, "no such extension"),
        ("GET", "/v2/systemsharedmemory/status", 404, "no such extension"),
        ("POST", "/v2/cudasharedmemory/region/a/register", 404, "no such extension"),
        ("GET", "/v2/nothing", 404, "no such extension"),
        ("GET", INFER, 405, "send POST"),
        ("POST", "/v2/health/live", 405, "send GET"),
        ("POST", "/v2/repository/models/lstm/unload", 400, "the operator"),
    ],
)
def test_unknown_paths_and_methods_are_answered_in_the_protocols_format(
    both: Server, method: str, path: str, status: int, told: str
) -> None:
    with both.client() as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    assert told in answer.json()["error"]


def request(**fields: Any) -> Any:
    asked = service_pb2.ModelInferRequest(model_name="lstm", raw_input_contents=[X.tobytes()])
    asked.inputs.add(**{"name": "x", "datatype": "FP32", "shape": X.shape, **fields})
    return asked


def changed(**fields: Any) -> Any:
    asked = request()
    for name, value in fields.items():
        if name == "raw":
            del asked.raw_input_contents[:]
            asked.raw_input_contents.extend(value)
        else:
            getattr(asked, name).extend(value)
    return asked


def with_parameter(name: str, **value: Any) -> Any:
    asked = request()
    asked.parameters[name].CopyFrom(service_pb2.InferParameter(**value))
    return asked


GRPC: dict[str, tuple[Any, str, str]] = {
    "another model": (service_pb2.ModelInferRequest(model_name="x"), "NOT_FOUND", "send one of"),
    "another version": (
        service_pb2.ModelInferRequest(model_name="lstm", model_version="9"),
        "NOT_FOUND",
        "send one of 1",
    ),
    "nothing": (service_pb2.ModelInferRequest(model_name="lstm"), "INVALID_ARGUMENT", "send x"),
    "another tensor": (request(name="z"), "INVALID_ARGUMENT", "send x"),
    "a strange name": (request(name="é\n\0" * 9, datatype="x"), "INVALID_ARGUMENT", "é"),
    "a long name": (request(name="é" * 100_000, datatype="x"), "INVALID_ARGUMENT", "ééé"),
    "another datatype": (request(datatype="BYTES"), "INVALID_ARGUMENT", "its datatype is 'BYTES': send FP32"),
    "a negative shape": (request(shape=[-1, 2, 5]), "INVALID_ARGUMENT", "its shape is"),
    "an enormous shape": (request(shape=[2**62, 2**62, 5]), "INVALID_ARGUMENT", "asks for"),
    "an enormous shape of nothing": (request(shape=[0, 2**63 - 1, 5]), "INVALID_ARGUMENT", "its shape is"),
    "too few bytes": (changed(raw=[X.tobytes()[:-1]]), "INVALID_ARGUMENT", "39 bytes"),
    "too many contents": (changed(raw=[X.tobytes()] * 2), "INVALID_ARGUMENT", "2 for 1 inputs"),
    "no contents": (changed(raw=[]), "INVALID_ARGUMENT", "0 numbers"),
    "NaN": (changed(raw=[np.full(10, np.nan, np.float32).tobytes()]), "INVALID_ARGUMENT", "not a finite number"),
    "another output": (
        changed(outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="h")]),
        "INVALID_ARGUMENT",
        "request y",
    ),
    "a sequence that is none": (with_parameter("sequence_id", double_param=1.0), "INVALID_ARGUMENT", "an integer or"),
    "a sequence of nothing": (with_parameter("sequence_id"), "INVALID_ARGUMENT", "an integer or"),
    "a flag that is none": (with_parameter("sequence_start", int64_param=1), "INVALID_ARGUMENT", "send true or false"),
    "too large": (changed(raw=[b"\0" * 2**21]), "RESOURCE_EXHAUSTED", "larger than max"),
}


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
@pytest.mark.parametrize("case", GRPC)
def test_a_bad_grpc_message_is_refused_with_the_reason(both: Server, case: str, compression: grpc.Compression) -> None:
    asked, code, told = GRPC[case]
    with grpc.insecure_channel(both.grpc, compression=compression) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(asked)
        assert error.value.code().name == code, error.value
        assert told in error.value.details() or code == "RESOURCE_EXHAUSTED"
        assert stub.ModelInfer(request()).raw_output_contents


def test_unsupported_grpc_methods_and_garbage_are_refused(both: Server) -> None:
    with grpc.insecure_channel(both.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for method, asked in (
            (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
            (stub.TraceSetting, service_pb2.TraceSettingRequest()),
            (stub.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest()),
        ):
            with pytest.raises(grpc.RpcError) as error:
                method(asked)
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        # Bytes that are no message at all.
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff" * 100)
        assert stub.ServerLive(service_pb2.ServerLiveRequest()).live


def test_a_client_that_does_not_read_its_stream_delays_nobody(both: Server) -> None:
    with grpc.insecure_channel(both.grpc) as channel, grpc.insecure_channel(both.grpc) as other:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        large = request(shape=[1, 2000, FEATURES])
        large.raw_input_contents[0] = noise(1, 2000, FEATURES).tobytes()
        call = stub.ModelStreamInfer(large for _ in range(2000))
        next(call)
        assert service_pb2_grpc.GRPCInferenceServiceStub(other).ModelInfer(request()).raw_output_contents
        call.cancel()


def test_large_grpc_messages_are_for_inference_only(both: Server) -> None:
    padding = b"\xf8\x07\x01" * 30_000  # a field that no message has
    service, reflection = "/inference.GRPCInferenceService", "/grpc.reflection.v1alpha.ServerReflection"
    with grpc.insecure_channel(both.grpc) as channel:
        calls: dict[str, Any] = {
            "metadata": lambda: channel.unary_unary(f"{service}/ModelMetadata")(padding, timeout=10),
            "load": lambda: channel.unary_unary(f"{service}/RepositoryModelLoad")(padding, timeout=10),
            "health": lambda: channel.unary_unary("/grpc.health.v1.Health/Check")(padding, timeout=10),
            "watch": lambda: next(channel.unary_stream("/grpc.health.v1.Health/Watch")(padding, timeout=10)),
            "reflection": lambda: next(
                channel.stream_stream(f"{reflection}/ServerReflectionInfo")(iter([padding]), timeout=10)
            ),
        }
        for name, call in calls.items():
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, name
            assert "at most 65536" in error.value.details(), name


def test_large_grpc_answers_are_whole(both: Server) -> None:
    x = noise(1, 30_000, FEATURES)
    asked = request(shape=x.shape)
    asked.raw_input_contents[0] = x.tobytes()
    with grpc.insecure_channel(both.grpc) as channel, both.client() as client:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer, [streamed] = stub.ModelInfer(asked), stub.ModelStreamInfer(iter([asked]))
        described = tensor(shape=x.shape, parameters={"binary_data_size": x.nbytes})
        del described["data"]
        head = body(described, outputs=[{"name": "y", "parameters": {"binary_data": True}}])
        by_http = client.post("/v2/models/lstm/infer", content=head + x.tobytes(), headers={LENGTH: str(len(head))})
    expected = by_http.content[int(by_http.headers[LENGTH]) :]
    assert len(expected) == 30_000 * OUTPUTS * 4
    assert answer.raw_output_contents[0] == streamed.infer_response.raw_output_contents[0] == expected
    assert list(answer.outputs[0].shape) == [1, 30_000, OUTPUTS]
