"""Ports to listen on, checked or bound before models are loaded, so that a conflict is reported at once."""

from __future__ import annotations

import errno
import socket

from cellserve.service.settings import flag


class PortTaken(Exception):
    """The port cannot be listened on; the message says why."""


def bind_port(setting: str, host: str, port: int, reuse_port: bool = False) -> socket.socket:
    """Returns a socket bound to an address.

    Args:
        setting: The port's setting, for the message.
        host: The address.
        port: The port.
        reuse_port: Whether several processes of this server share the port.

    Raises:
        PortTaken: It cannot be bound.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        _bind(bound, (host, port), reuse_port)
    except OSError as error:
        bound.close()
        raise PortTaken(f"{flag(setting)} {port}: {error.strerror}") from None
    return bound


def check_port(setting: str, host: str, port: int, reuse_port: bool = False) -> None:
    """Binds a port of all of a host's addresses for a moment, for servers that bind it themselves later.

    Args:
        setting: The port's setting, for the message.
        host: The address, or a name with several.
        port: The port.
        reuse_port: Whether several processes of this server share the port.

    Raises:
        PortTaken: It cannot be bound.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise PortTaken(f"--host {host}: {error.strerror}") from None
    missing = []  # why addresses are not this machine's; a name may have an IPv6 address where IPv6 is off
    for kind, *_, address in addresses:
        try:
            with socket.socket(kind, socket.SOCK_STREAM) as probe:
                _bind(probe, address, reuse_port)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise PortTaken(f"{flag(setting)} {port}: {error.strerror}") from None
            missing.append(error.strerror)
    if len(missing) == len(addresses):
        raise PortTaken(f"--host {host}: {missing[0]}")


def _bind(unbound: socket.socket, address: object, reuse_port: bool) -> None:
    unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        unbound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    unbound.bind(address)  # type: ignore[arg-type]
