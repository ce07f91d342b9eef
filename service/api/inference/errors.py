"""What the protocol answers instead of a result: `{"error": ...}` with Triton's statuses, over gRPC a status code."""

from __future__ import annotations

import orjson

from cellserve.service.errors import Problem

# By the problem's own status: the HTTP status that Triton has for the like (`HttpCodeFromError` in its
# http_server.cc), and the name of gRPC's code. Triton has no keys, positions or expired sequences: these are ours.
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
    422: (400, "INVALID_ARGUMENT"),
    503: (503, "UNAVAILABLE"),
}


class SequenceNotStarted(Problem):
    """A step of a sequence that was never heard of, without the flag that starts it."""

    status = 400
    title = "The sequence was not started"


class NotByProtocol(Problem):
    """What the protocol has, and this server does in another way or not at all."""

    status = 400
    title = "Not done over this protocol"


class NotReady(Problem):
    """The server takes no requests yet, or no more."""

    status = 503
    title = "The server is not ready"
    retry_after = 1


def http_status(problem: Problem) -> int:
    """Gives the HTTP status of an answer."""
    return _STATUSES.get(problem.status, (500, ""))[0]


def grpc_code(problem: Problem) -> str:
    """Gives the name of gRPC's status code."""
    return _STATUSES.get(problem.status, (500, "INTERNAL"))[1]


def document(problem: Problem, request_id: str) -> bytes:
    """Gives the JSON of an answer: the message as `error`, beside it what a program can act on, such as `position`."""
    return orjson.dumps({"error": problem.detail, **problem.extensions, "request_id": request_id})
