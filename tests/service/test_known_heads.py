"""Requests are taken without the parser only if all that it would say of them is known."""

from __future__ import annotations

import pytest

from cellserve.service.api.connections import known_heads
from cellserve.service.api.connections.known_heads import KnownHeads

HEADERS = [(b"host", b"x"), (b"content-length", b"2")]
LINES = b"Host: x\r\nContent-Length: 2\r\n\r\n"


def post(target: bytes, lines: bytes = LINES, body: bytes = b"{}") -> bytes:
    return b"POST %b HTTP/1.1\r\n%b%b" % (target, lines, body)


@pytest.fixture
def heads() -> KnownHeads:
    heads = KnownHeads()
    heads.learn(post(b"/sessions/a/step"), HEADERS, b"{}")
    return heads


def test_another_target_with_the_same_headers_is_known(heads: KnownHeads) -> None:
    for target in (b"/sessions/a/step", b"/sessions/b.c-d_0~/step", b"/predict", b"/predict?model=lstm&outputs=all"):
        found = heads.find(post(target, body=b"[]"))
        assert found is not None
        assert found == (target, HEADERS, 2, b"[]")
        found.headers.clear()  # whoever gets them may change them


@pytest.mark.parametrize("body", [b"", b"{"])
def test_the_rest_of_a_body_may_come_later(heads: KnownHeads, body: bytes) -> None:
    assert heads.find(post(b"/predict", body=body)) == (b"/predict", HEADERS, 2, body)


@pytest.mark.parametrize(
    "data",
    [
        post(b"/sessions/a/step", body=b"{} "),
        post(b"/sessions/a/step") + post(b"/sessions/a/step"),
        post(b"/sessions/a/step", LINES.replace(b"2", b"3")),
        post(b"/sessions/a/step", LINES.replace(b"Host", b"host")),
        post(b"/sessions/a/step", LINES[:-2]),
        post(b"/sessions/a%2fb/step"),
        post(b"/sessions/a b/step"),
        post(b"/sessions//step"),
        post(b"/sessions/a\n/step"),
        post(b"/sessions/\xe4/step"),
        post(b"/sessions/a/fork"),
        post(b"/predict#a"),
        post(b"/predict").replace(b"HTTP/1.1", b"HTTP/1.0"),
        post(b"/predict").replace(b"\r\n", b"\n"),
        post(b"/predict").replace(b"POST", b"PUT"),
        b"\r\n" + post(b"/predict"),
        b"",
    ],
)
def test_all_else_is_for_the_parser(heads: KnownHeads, data: bytes) -> None:
    assert heads.find(data) is None


def test_only_one_request_is_learnt() -> None:
    heads = KnownHeads()
    data = post(b"/predict")
    heads.learn(data + data, HEADERS, b"{}")
    heads.learn(data, HEADERS, b"{")
    heads.learn(data.replace(b"\r\n\r\n", b"\n\n"), HEADERS, b"{}")
    heads.learn(data, HEADERS[:1], b"{}")
    heads.learn(post(b"/predict", b"Host: x\r\n\nPadding: x\r\n\r\n", b"{}"), HEADERS, b"Padding: x\r\n\r\n{}")
    assert heads.find(data) is None
    heads.learn(post(b"/predict", body=b""), HEADERS, b"")  # its body comes later
    assert heads.find(data) is not None


def test_the_oldest_are_forgotten_and_large_ones_are_not_kept(
    heads: KnownHeads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_heads, "_MOST_HEADS", 2)
    large = b"Host: %b\r\n\r\n" % (b"x" * 2048)
    heads.learn(post(b"/predict", large), HEADERS, b"{}")
    assert heads.find(post(b"/predict", large)) is None
    for name in (b"y", b"z"):
        heads.learn(post(b"/predict", LINES.replace(b"x", name)), HEADERS, b"{}")
    assert heads.find(post(b"/predict")) is None
    assert heads.find(post(b"/predict", LINES.replace(b"x", b"y")))
