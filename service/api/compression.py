"""gzip and deflate content encodings (RFC 9110, section 8.4.1), with a limit on the decompressed size."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable, Iterator

from cellserve.service.errors import BodyTooLarge, NotJson, UnsupportedMediaType

_WINDOW = {b"gzip": 31, b"deflate": 15}  # zlib's wbits, which select the format
_LEVEL = 1  # most of the gain at the least CPU time
_SMALL = 1024  # bytes; compressing smaller answers gains nothing
_LARGE = 64 * 1024  # bytes; larger answers are compressed on a thread


async def decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Returns a decompressed body.

    Raises:
        UnsupportedMediaType: The encoding is neither gzip nor deflate.
        BodyTooLarge: It decompresses to more than `limit` bytes.
        NotJson: It is not in that encoding, or is truncated.
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
    """Returns the encoding to answer with by an `Accept-Encoding` header, gzip before deflate; None for none."""
    offered = set()
    for part in header.lower().split(b","):
        name, _, weight = part.replace(b" ", b"").partition(b";q=")
        if weight.strip(b"0.") or not weight:
            offered.add(name)
    return next((encoding for encoding in _WINDOW if encoding in offered), None)


async def compressed(body: bytes, encoding: bytes) -> bytes | None:
    """Returns the compressed body, or None if it is too small to gain."""
    if len(body) < _SMALL:
        return None
    if len(body) <= _LARGE:
        return _compress(body, _WINDOW[encoding])
    return await asyncio.get_running_loop().run_in_executor(None, _compress, body, _WINDOW[encoding])


def compressed_parts(parts: Iterable[bytes], encoding: bytes) -> Iterator[bytes]:
    """Yields a body in parts, compressed, which takes milliseconds for each."""
    compressor = zlib.compressobj(_LEVEL, wbits=_WINDOW[encoding])
    for part in parts:
        yield compressor.compress(part)
    yield compressor.flush()


def _compress(body: bytes, window: int) -> bytes:
    compressor = zlib.compressobj(_LEVEL, wbits=window)
    return compressor.compress(body) + compressor.flush()


def _decompress(body: bytes, window: int, limit: int) -> bytes:
    decompressor = zlib.decompressobj(window)
    try:
        plain = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise NotJson(
            f"the body cannot be decompressed ({error}): its content must match its Content-Encoding"
        ) from None
    if len(plain) > limit:
        raise BodyTooLarge(
            f"the body is larger than {limit} bytes when decompressed: split it into several requests", limit=limit
        )
    if not decompressor.eof or decompressor.unused_data:
        raise NotJson("the compressed body is truncated, or followed by other data: send one complete stream")
    return plain
