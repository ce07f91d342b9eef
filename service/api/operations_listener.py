"""A port of its own for operations, in the same process and event loop as the main one."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.server import ServerState

_CLOSING_SECONDS = 1

log = logging.getLogger("cellserve")


class PortTaken(Exception):
    """The port cannot be listened on; the message says why."""


def check_free(flag: str, host: str, port: int, several: bool = False) -> None:
    """Binds a port for a moment, before anything that takes long is done.

    Args:
        flag: The setting that names it, for the message.
        host: The address.
        port: The port.
        several: Whether other processes of this server listen there too.

    Raises:
        PortTaken: It is not to be had.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise PortTaken(f"--host {host}: {error.strerror}") from None
    missing = []  # addresses that this machine has not: a name may have one of IPv6 where that is off
    for kind, *_, address in addresses:
        try:
            with socket.socket(kind, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if several:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise PortTaken(f"{flag} {port}: {error.strerror}") from None
            missing.append(error.strerror)
    if len(missing) == len(addresses):
        raise PortTaken(f"--host {host}: {missing[0]}")


class OperationsListener:
    """A second listener. Signals are the main server's affair; this one opens and closes with the application.

    Args:
        app: What answers there.
        host: The address.
        port: The port.
        several: Whether other processes of this server listen there too; then any of them answers.

    Raises:
        PortTaken: It is not to be had.
    """

    def __init__(self, app: Any, host: str, port: int, several: bool) -> None:
        self._config = uvicorn.Config(
            app, access_log=False, lifespan="off", interface="asgi3", ws="none", log_config=None,
            server_header=False, proxy_headers=False,
        )  # fmt: skip
        self._config.load()
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if several:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            raise PortTaken(f"--operations-port {port}: {error.strerror}") from None
        self._told = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._state = ServerState()

    async def open(self) -> None:
        """Begins to listen."""

        def connection() -> asyncio.Protocol:
            protocol: Any = self._config.http_protocol_class
            made: asyncio.Protocol = protocol(config=self._config, server_state=self._state, app_state={})
            return made

        self._server = await asyncio.get_running_loop().create_server(connection, sock=self._socket)
        log.info("operations on %s", self._told)

    async def close(self) -> None:
        """Answers what is under way, and stops."""
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=_CLOSING_SECONDS)
