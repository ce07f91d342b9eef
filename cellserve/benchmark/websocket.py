"""Frames of a WebSocket as a client sends them."""

from __future__ import annotations

import struct

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10  # opcodes


def frame(payload: bytes, opcode: int) -> bytes:
    """Returns a frame (RFC 6455, section 5.2) with a mask of zeros, which leaves the payload as it is."""
    length = len(payload)
    if length < 126:
        head = struct.pack(">BB", 0x80 | opcode, 0x80 | length)
    elif length < 1 << 16:
        head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, length)
    else:
        head = struct.pack(">BBQ", 0x80 | opcode, 0x80 | 127, length)
    return head + bytes(4) + payload
