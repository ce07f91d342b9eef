"""What the head of a request must be."""

from __future__ import annotations

import pytest

from cellserve.service.api.connections.http_head import (
    Headers,
    asks_for_websocket,
    check_head,
    path_of,
    without_upgrade,
)
from cellserve.service.api.connections.limits import MAX_HEADERS, MAX_TARGET_BYTES
from cellserve.service.errors import HeadTooLarge, MalformedRequest, Problem, TargetTooLong

HOST = (b"host", b"x")


@pytest.mark.parametrize(
    ("version", "target", "headers", "problem"),
    [
        ("1.1", b"/", [], MalformedRequest),
        ("1.1", b"/", [HOST, HOST], MalformedRequest),
        ("1.0", b"/", [HOST, HOST], MalformedRequest),
        ("0.9", b"/", [HOST], MalformedRequest),
        ("2.0", b"/", [HOST], MalformedRequest),
        ("1.1", b"/", [HOST, (b"transfer-encoding", b"identity")], MalformedRequest),
        ("1.1", b"/", [HOST, (b"transfer-encoding", b"gzip, chunked")], MalformedRequest),
        ("1.1", b"/", [HOST, *[(b"transfer-encoding", b"chunked")] * 2], MalformedRequest),
        ("1.0", b"/", [HOST, (b"transfer-encoding", b"chunked")], MalformedRequest),
        ("1.1", b"/" * (MAX_TARGET_BYTES + 1), [HOST], TargetTooLong),
        ("1.1", b"/", [HOST, *[(b"a", b"b")] * MAX_HEADERS], HeadTooLarge),
    ],
)
def test_what_is_refused(version: str, target: bytes, headers: Headers, problem: type[Problem]) -> None:
    with pytest.raises(problem):
        check_head(version, target, headers)


def test_what_is_taken() -> None:
    check_head("1.1", b"/" * MAX_TARGET_BYTES, [HOST, (b"transfer-encoding", b"Chunked"), *[(b"a", b"b")] * 98])
    check_head("1.0", b"/", [])


def test_an_escaped_slash_does_not_separate() -> None:
    assert path_of(b"/sessions/a%2fb%2Fc/st%65p") == "/sessions/a%2Fb%2Fc/step"


def test_only_a_get_without_a_body_becomes_a_websocket() -> None:
    upgrade = (b"upgrade", b"WebSocket")
    assert asks_for_websocket(b"GET", "1.1", [HOST, upgrade, (b"content-length", b"0")])
    assert not asks_for_websocket(b"POST", "1.1", [HOST, upgrade])
    assert not asks_for_websocket(b"GET", "1.0", [HOST, upgrade])
    assert not asks_for_websocket(b"GET", "1.1", [HOST, (b"upgrade", b"h2c")])
    assert not asks_for_websocket(b"GET", "1.1", [HOST, upgrade, (b"content-length", b"2")])


def test_an_ignored_upgrade_leaves_the_rest_of_the_head() -> None:
    headers = [HOST, (b"connection", b"Upgrade, close"), (b"upgrade", b"h2c"), (b"content-length", b"2")]
    expected = b"POST /x HTTP/1.1\r\nhost: x\r\nconnection:  close\r\ncontent-length: 2\r\n\r\n"
    assert without_upgrade(b"POST", b"/x", "1.1", headers) == expected
