"""What the head of an HTTP request must be, beyond what the parser checks: RFC 9112 leaves no room for two readings."""

from __future__ import annotations

import re
from urllib.parse import unquote

from cellserve.service.api.connections.limits import MAX_HEADERS, MAX_TARGET_BYTES
from cellserve.service.errors import HeadTooLarge, MalformedRequest, TargetTooLong

Headers = list[tuple[bytes, bytes]]


def check_head(version: str, target: bytes, headers: Headers) -> None:
    """Raises a problem if a request's head is too large, or could be understood in two ways.

    Args:
        version: The version of HTTP, such as `1.1`.
        target: The request's target.
        headers: Its headers, with their names in lower case.

    Raises:
        TargetTooLong: The target is too long.
        HeadTooLarge: There are too many headers.
        MalformedRequest: The version, the host or the transfer encoding is not what RFC 9112 wants.
    """
    if len(target) > MAX_TARGET_BYTES:
        raise target_too_long()
    if len(headers) > MAX_HEADERS:
        raise HeadTooLarge(f"the request has {len(headers)} headers: send at most {MAX_HEADERS}")
    if version not in ("1.1", "1.0"):
        raise MalformedRequest(f"HTTP/{version} is not supported: send HTTP/1.1")
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (not hosts and version == "1.1"):  # section 3.2
        raise MalformedRequest(f"the request has {hosts} Host headers: send one")
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or version == "1.0"):  # section 6.1
        raise MalformedRequest("Transfer-Encoding: send chunked, once and in HTTP/1.1, or a Content-Length")


def path_of(raw: bytes) -> str:
    """Returns a path as it was sent, decoded except for `%2F`: a slash within a segment is no separator (RFC 3986)."""
    return unquote(re.sub("%2f", "%252F", raw.decode(), flags=re.IGNORECASE))


def target_too_long() -> TargetTooLong:
    """Returns the problem of a target that is too long."""
    return TargetTooLong(f"the request's target has more than {MAX_TARGET_BYTES} bytes: send less in the query")


def asks_for_websocket(method: bytes, version: str, headers: Headers) -> bool:
    """Whether a request to upgrade is one to a WebSocket (RFC 6455, section 4.2.1), not some other upgrade."""
    return (
        method == b"GET"
        and version == "1.1"
        and any(name == b"upgrade" and value.lower() == b"websocket" for name, value in headers)
        and all(
            name != b"transfer-encoding" and (name != b"content-length" or value == b"0") for name, value in headers
        )
    )


def without_upgrade(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """Returns the head of a request as it would be without the upgrade that it asks for."""
    lines = [b"%b %b HTTP/%b\r\n" % (method, target, version.encode())]
    for name, value in headers:
        if name == b"connection":
            value = b", ".join(token for token in value.split(b",") if token.strip().lower() != b"upgrade")
        if name != b"upgrade":
            lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join([*lines, b"\r\n"])
