"""Frames that are whole messages: read and written as the websockets library does."""

from __future__ import annotations

import pytest
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from cellserve.service.api.connections.whole_frames import head_of, whole_message

SIZES = (0, 1, 125, 126, 127, 65535)
KINDS = (Opcode.TEXT, Opcode.BINARY)


def of_client(opcode: Opcode, content: bytes, fin: bool = True) -> bytes:
    return bytes(Frame(opcode, content, fin).serialize(mask=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_message_is_read(kind: Opcode, size: int) -> None:
    content = bytes(range(256)) * 256
    assert whole_message(of_client(kind, content[:size]), 65535) == (content[:size], kind is Opcode.TEXT)


def test_anything_else_is_left_to_the_parser() -> None:
    whole = of_client(Opcode.TEXT, b"ab")
    others = (
        b"",
        whole[:-1],
        whole + b"\x81",
        whole + whole,
        of_client(Opcode.TEXT, b"ab", fin=False),
        of_client(Opcode.CONT, b"ab"),
        of_client(Opcode.PING, b"ab"),
        bytes(Frame(Opcode.TEXT, b"ab").serialize(mask=False)) + bytes(4),
        bytes((whole[0] | 0x40, *whole[1:])),  # compressed, say
        of_client(Opcode.BINARY, bytes(65536)),
        of_client(Opcode.BINARY, bytes(11)),
    )
    assert [whole_message(data, 10) for data in others] == [None] * len(others)
    large = of_client(Opcode.BINARY, bytes(70_000))
    assert not any(whole_message(large[:received], 10**6) for received in range(1000))


@pytest.mark.parametrize("size", (*SIZES, 65536))
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_the_librarys(kind: Opcode, size: int) -> None:
    sent = head_of(size, kind is Opcode.TEXT) + bytes(size)
    assert sent == Frame(kind, bytes(size)).serialize(mask=False)
    reader = StreamReader()
    reader.feed_data(sent)
    with pytest.raises(StopIteration) as read:
        next(Frame.parse(reader.read_exact, mask=False))
    assert read.value.value.data == bytes(size)
