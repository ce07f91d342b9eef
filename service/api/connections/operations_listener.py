"""A second listener for operations, in the same process and event loop as the main server."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from cellserve.service.api.connections.bounded_http import BoundedHttp
from cellserve.service.api.connections.ports import bind_port

_CLOSING_SECONDS = 1

log = logging.getLogger("cellserve")


class OperationsListener:
    """A second HTTP listener. The main server handles signals; this one opens and closes with the application.

    Args:
        host: The address.
        port: The port, which is bound at once.
        reuse_port: Whether other processes of this server listen there too; then any of them answers.

    Raises:
        PortTaken: The port cannot be bound.
    """

    def __init__(self, host: str, port: int, reuse_port: bool) -> None:
        self._socket = bind_port("operations_port", host, port, reuse_port)
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._state = ServerState()

    async def open(self, app: Any) -> None:
        """Starts to listen for requests to an ASGI application."""
        config = uvicorn.Config(
            app, access_log=False, lifespan="off", interface="asgi3", http=BoundedHttp, ws="none", log_config=None,
            server_header=False, proxy_headers=False,
        )  # fmt: skip
        config.load()

        def connection() -> asyncio.Protocol:
            protocol: Any = config.http_protocol_class
            created: asyncio.Protocol = protocol(config=config, server_state=self._state, app_state={})
            return created

        self._server = await asyncio.get_running_loop().create_server(connection, sock=self._socket)
        log.info("operations on %s", self._url)

    async def close(self) -> None:
        """Finishes requests in progress, and stops listening."""
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=_CLOSING_SECONDS)
