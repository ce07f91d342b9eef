"""The protocol's errors: `{"error": ...}` with Triton's HTTP statuses, or a gRPC status."""

from __future__ import annotations

import orjson

from cellserve.service.errors import Problem

# From a problem's own status to Triton's HTTP status for such an error (`HttpCodeFromError` in its http_server.cc) and
# gRPC's code. Triton has no keys, positions or expired sequences: these rows are ours.
_STATUSES = {
    400: (400, "INVALID_ARGUMENT"),
    401: (401, "UNAUTHENTICATED"),
    403: (403, "PERMISSION_DENIED"),
    404: (404, "NOT_FOUND"),
    405: (405, "UNIMPLEMENTED"),
    409: (409, "ABORTED"),
    410: (410, "FAILED_PRECONDITION"),
    413: (413, "RESOURCE_EXHAUSTED"),
    415: (415, "INVALID_ARGUMENT"),
    421: (421, "PERMISSION_DENIED"),
    422: (400, "INVALID_ARGUMENT"),
    429: (429, "RESOURCE_EXHAUSTED"),
    503: (503, "UNAVAILABLE"),
}


class SequenceNotStarted(Problem):
    """A step of an unknown sequence without `sequence_start`."""

    status = 400
    title = "The sequence was not started"


class NotByProtocol(Problem):
    """A part of the protocol that this server does not support."""

    status = 400
    title = "Not done over this protocol"


class NotReady(Problem):
    """The server is starting or stopping."""

    status = 503
    title = "The server is not ready"
    retry_after = 1


def http_status(problem: Problem) -> int:
    """Returns the HTTP status of an answer."""
    return _STATUSES.get(problem.status, (500, ""))[0]


def grpc_code(problem: Problem) -> str:
    """Returns the name of gRPC's status code."""
    return _STATUSES.get(problem.status, (500, "INTERNAL"))[1]


def document(problem: Problem, request_id: str) -> bytes:
    """Returns the JSON of an answer: the message as `error`, and members for programs, such as `position`."""
    return orjson.dumps({"error": problem.detail, **problem.extensions, "request_id": request_id})
