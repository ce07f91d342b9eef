"""WebSocket frames that are whole messages (RFC 6455, section 5.2), read and written without a parser's state."""

from __future__ import annotations

from websockets.frames import apply_mask  # type: ignore[attr-defined]

_TEXT, _BINARY = 0x81, 0x82  # the first byte: the last frame of its message, and the message's kind
_MASKED = 0x80  # a flag of the second byte, whose other bits are the length
_TWO_MORE, _EIGHT_MORE = 126, 127  # in place of a length: it is in so many further bytes
_HEAD = 6  # bytes before the content of a client's frame, if its length is in the second one


def whole_message(data: bytes, largest: int) -> tuple[bytes, bool] | None:
    """Returns the message that these bytes of a client are, and whether it is text; None if they are anything else.

    Args:
        data: What was received, from the start of a frame on.
        largest: The largest message, in bytes. Those of 64 KB and more are left to the parser too.
    """
    if len(data) < _HEAD or data[0] not in (_TEXT, _BINARY) or data[1] < _MASKED:
        return None
    start, length = _HEAD, data[1] - _MASKED
    if length == _EIGHT_MORE:
        return None
    if length == _TWO_MORE:
        start, length = _HEAD + 2, int.from_bytes(data[2:4], "big")
    if len(data) != start + length or length > largest:
        return None
    return bytes(apply_mask(data[start:], data[start - 4 : start])), data[0] == _TEXT


def head_of(size: int, text: bool) -> bytes:
    """Returns what a server sends before the content of a message of so many bytes."""
    kind = _TEXT if text else _BINARY
    if size < _TWO_MORE:
        return bytes((kind, size))
    if size < 1 << 16:
        return bytes((kind, _TWO_MORE)) + size.to_bytes(2, "big")
    return bytes((kind, _EIGHT_MORE)) + size.to_bytes(8, "big")
