"""gRPC's front: frames pass unchanged however they arrive, and header fields without end do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cellserve.service.api.connections.limits import MAX_HEADERS
from cellserve.service.api.inference.grpc_front import MAX_BLOCK_BYTES, FrameFilter, HeadersTooLarge
from cellserve.service.api.inference.hpack import count_fields

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, CONTINUATION, END_HEADERS = 1, 9, 4
INDEXED = b"\x82"  # a field of one byte: `:method: GET`


def frame(kind: int, flags: int = 0, payload: bytes = b"", stream: int = 1) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def block(fields: bytes, *sizes: int, flags: int = 0) -> bytes:
    """A header block in one frame, or in several whose first ones have these sizes."""
    parts = []
    for size in sizes:
        parts.append(fields[:size])
        fields = fields[size:]
    parts.append(fields)
    kinds = [HEADERS] + [CONTINUATION] * (len(parts) - 1)
    last = len(parts) - 1
    return b"".join(
        frame(kind, (END_HEADERS if place == last else 0) | (0 if place else flags), part)
        for place, (kind, part) in enumerate(zip(kinds, parts, strict=True))
    )


def passed(filter_: FrameFilter, data: bytes) -> bytes:
    filter_.receive(data)
    return b"".join(iter(filter_.passed, b""))


# Fields as they may be sent, one each (RFC 7541, sections 6.1 to 6.3 and 5.1).
literals = some.builds(
    lambda first, name, value: bytes([first, len(name)]) + name + bytes([len(value)]) + value,
    some.sampled_from((0x00, 0x10, 0x40)),
    some.binary(max_size=20),
    some.binary(max_size=20),
)
named = some.builds(
    lambda first, value: first + bytes([0x80 | len(value)]) + value,
    some.sampled_from((b"\x04", b"\x41", b"\x0f\x10", b"\x7f\x80\x01")),
    some.binary(max_size=20),
)
long = some.integers(127, 1000).map(lambda n: b"\x00\x01a\x7f" + _after_127(n) + b"x" * n)
fields = some.sampled_from((INDEXED, b"\xff\x05", b"\x20", b"\x3f\xe1\x1f")) | literals | named | long


def _after_127(number: int) -> bytes:
    """The bytes that follow the first one of an integer of 127 and more (section 5.1)."""
    rest = number - 127
    return bytes([rest & 0x7F | 0x80, rest >> 7]) if rest > 127 else bytes([rest])


@given(some.lists(fields, max_size=20))
def test_the_fields_of_a_block_are_counted(sent: list[bytes]) -> None:
    assert count_fields(b"".join(sent), 100) == len(sent)


@given(some.binary(max_size=200))
def test_counting_ends_whatever_is_sent(sent: bytes) -> None:
    assert 0 <= count_fields(sent, 10) <= 11


others = some.builds(
    frame, some.sampled_from((0, 2, 3, 4, 6, 8, 0x55)), some.integers(0, 255), some.binary(max_size=50)
)
blocks = some.builds(
    lambda sent, sizes: block(b"".join(sent), *sizes),
    some.lists(fields, max_size=10),
    some.lists(some.integers(0, 30), max_size=5),
)


@given(some.lists(others | blocks, max_size=20), some.lists(some.integers(1, 60), min_size=1))
def test_frames_pass_unchanged_however_they_arrive(frames: list[bytes], sizes: list[int]) -> None:
    data = PREFACE + b"".join(frames)
    filter_, out, at = FrameFilter(), b"", 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        out += passed(filter_, data[at : at + size])
        assert data.startswith(out)
        at += size
    assert out == data


def test_a_block_passes_once_it_is_complete() -> None:
    filter_, sent = FrameFilter(), block(INDEXED * 9, 3)
    assert passed(filter_, PREFACE + sent[:-1]) == PREFACE
    assert passed(filter_, sent[-1:]) == sent


def test_padding_and_priority_are_no_fields() -> None:
    padded = block(b"\x03" + bytes(5) + INDEXED * MAX_HEADERS + bytes(3), flags=8 | 32)
    assert passed(FrameFilter(), PREFACE + padded) == PREFACE + padded


def test_as_many_fields_and_bytes_as_http_allows_pass() -> None:
    value = b"\x00\x01a\x7f" + _after_127(10_000) + b"x" * 10_000
    for sent in (block(INDEXED * MAX_HEADERS), block(value)):
        assert passed(FrameFilter(), PREFACE + sent) == PREFACE + sent


@pytest.mark.parametrize(
    "sent",
    [
        block(INDEXED * (MAX_HEADERS + 1)),
        block(INDEXED * (MAX_HEADERS + 1), *[1] * 90),
        frame(HEADERS, 0, INDEXED) + frame(CONTINUATION) * (MAX_BLOCK_BYTES // 9),
        frame(HEADERS, 0, b"\x00\x01a\x7f") + frame(CONTINUATION, 0, b"x" * 10_000) * 2,
        frame(HEADERS, END_HEADERS, bytes(MAX_BLOCK_BYTES)),
        frame(HEADERS, END_HEADERS, bytes(MAX_BLOCK_BYTES))[:9],
        frame(HEADERS, 0, INDEXED) + frame(6, 0, bytes(8)),
        block(b"\x00\x01a\x7f"),
    ],
    ids=["too many", "in fragments", "empty fragments", "too long", "a long frame", "its head", "cut off", "no HPACK"],
)
def test_header_fields_beyond_the_limits_are_refused(sent: bytes) -> None:
    filter_ = FrameFilter()
    with pytest.raises(HeadersTooLarge):
        passed(filter_, PREFACE + sent)
