"""A line break after JSON answers to curl, so that a shell's prompt does not follow them on the same line."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_WITHOUT_BODY = (204, 304)


def is_curl(user_agent: bytes) -> bool:
    """Whether a request's `User-Agent` is that of the program curl."""
    return user_agent.startswith(b"curl/")


class CurlNewlineMiddleware:
    """Ends JSON answers to curl with a line break, and leaves all others as they are.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serves one connection."""
        if scope["type"] == "http" and any(
            name == b"user-agent" and is_curl(value) for name, value in scope["headers"]
        ):
            send = _with_newline(send)
        return self.app(scope, receive, send)


def _with_newline(send: Send) -> Send:
    is_json = False

    async def send_line(message: Message) -> None:
        nonlocal is_json
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            has_body = message["status"] not in _WITHOUT_BODY and b"content-encoding" not in headers
            is_json = has_body and headers.get(b"content-type", b"").endswith(b"json")
            if is_json and b"content-length" in headers:
                longer = b"%d" % (int(headers[b"content-length"]) + 1)
                others = [(name, value) for name, value in message["headers"] if name != b"content-length"]
                message = {**message, "headers": [*others, (b"content-length", longer)]}
        elif is_json and not message.get("more_body"):
            message = {**message, "body": message.get("body", b"") + b"\n"}
        await send(message)

    return send_line
