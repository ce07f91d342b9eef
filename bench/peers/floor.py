"""The floor: uvicorn with an endpoint that reads the body and answers a constant; a WebSocket that echoes."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

ANSWER = (
    b'{"session":"0123456789abcdef0123456789abcdef","position":1234,"y":[0.12345678,0.12345678,0.12345678,0.12345678]}'
)
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": ANSWER})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False, ws="websockets-sansio",
                ws_per_message_deflate=False, lifespan="off", log_level="warning")  # fmt: skip
