"""gzip and deflate, as RFC 9110 (section 8.4.1) has them, of bodies that must not grow beyond a bound."""

from __future__ import annotations

import asyncio
import zlib

from cellserve.service.errors import BodyTooLarge, NotJson, UnsupportedMediaType

_WINDOW = {b"gzip": 31, b"deflate": 15}  # of zlib: the format is chosen by it
_LEVEL = 1  # most of the size for little of the time
_SMALL = 1024  # bytes: an answer below gains nothing
_LARGE = 64 * 1024  # bytes: a body beyond is done on a thread, beside the event loop


async def decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Gives a body as it was before it was compressed.

    Raises:
        UnsupportedMediaType: The encoding is neither gzip nor deflate.
        BodyTooLarge: It is larger than `limit` bytes.
        NotJson: It is not what it says, or is cut off.
    """
    window = _WINDOW.get(encoding.strip().lower())
    if window is None:
        raise UnsupportedMediaType(
            f"the body has the content encoding {encoding.decode('latin-1')[:40]!r}: send gzip, deflate or neither"
        )
    if len(body) <= _SMALL:
        return _decompress(body, window, limit)
    return await asyncio.get_running_loop().run_in_executor(None, _decompress, body, window, limit)


def accepted(header: bytes) -> bytes | None:
    """Gives the encoding that an `Accept-Encoding` header lets an answer have, gzip before deflate."""
    offered = set()
    for part in header.lower().split(b","):
        name, _, weight = part.replace(b" ", b"").partition(b";q=")
        if weight.strip(b"0.") or not weight:
            offered.add(name)
    return next((encoding for encoding in _WINDOW if encoding in offered), None)


async def compressed(body: bytes, encoding: bytes) -> bytes | None:
    """Gives a body compressed, or None where that is not worth it."""
    if len(body) < _SMALL:
        return None
    if len(body) <= _LARGE:
        return _compress(body, _WINDOW[encoding])
    return await asyncio.get_running_loop().run_in_executor(None, _compress, body, _WINDOW[encoding])


def _compress(body: bytes, window: int) -> bytes:
    compressor = zlib.compressobj(_LEVEL, wbits=window)
    return compressor.compress(body) + compressor.flush()


def _decompress(body: bytes, window: int, limit: int) -> bytes:
    decompressor = zlib.decompressobj(window)
    try:
        plain = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise NotJson(f"the body cannot be decompressed ({error}): send it as its Content-Encoding says") from None
    if len(plain) > limit:
        raise BodyTooLarge(f"the body is larger than {limit} bytes when decompressed: send it in parts", limit=limit)
    if not decompressor.eof or decompressor.unused_data:
        raise NotJson("the compressed body is cut off, or something follows it: send one whole stream")
    return plain
