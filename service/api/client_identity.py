"""Who a client is: the owner of its key, else its address, however many connections it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, MutableMapping
from typing import Literal
from urllib.parse import unquote

from starlette.types import Scope
from uvicorn.middleware.proxy_headers import _TrustedHosts

from cellserve.service.access.peer_address import Address, host_identity

Scheme = Literal["http", "https"]


def client_of(owner: str, source: Scope | asyncio.BaseTransport) -> str:
    """Returns a client's identity: the owner of its key, or where no keys are used, its address.

    Args:
        owner: The owner; empty where no keys are used.
        source: The request's scope, or the connection's transport.
    """
    return owner or peer_of(source)


def peer_of(source: Scope | asyncio.BaseTransport) -> str:
    """Returns the address of a client, an IPv6 address by its network; empty for a Unix socket.

    Args:
        source: A request's scope, whose `client` is the address that a trusted proxy forwards; or a transport.
    """
    # Not by the transport's type: uvloop's are none of asyncio's.
    known = source.get("client") if isinstance(source, MutableMapping) else source.get_extra_info("peername")
    return "" if isinstance(known, str | bytes) else address_identity(known)


def address_identity(address: Address) -> str:
    """Returns the identity of an address: that of its host; empty for a Unix socket."""
    return host_identity(address[0]) if address else ""


def grpc_peer(peer: str) -> str:
    """Returns the address in what gRPC's `context.peer()` says.

    Args:
        peer: Such as `ipv4:10.0.0.7:50712`, or behind `GrpcFront` `unix-abstract:NAME/10.0.0.7:1`.
    """
    host = unquote(peer).partition(":")[2].rpartition("/")[2].rpartition(":")[0]
    return host_identity(host.strip("[]"))


class TrustedProxies:
    """The proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed.

    Args:
        trusted: Their addresses and networks, separated by commas.
    """

    def __init__(self, trusted: str) -> None:
        self._hosts = _TrustedHosts(trusted)

    def __contains__(self, peer: Address) -> bool:
        """Whether a connection's peer is one of them."""
        return peer is not None and peer[0] in self._hosts

    def forwarded(self, peer: Address, headers: Iterable[tuple[bytes, bytes]]) -> tuple[Address, Scheme]:
        """Returns the client's address and scheme that a trusted proxy forwards; else the proxy's own and `http`."""
        scheme: Scheme = "http"
        hosts = []
        for name, value in headers:
            if name == b"x-forwarded-proto":
                scheme = "https" if value == b"https" else "http"
            elif name == b"x-forwarded-for":
                hosts.append(value.decode("latin-1"))
        host, port = self._hosts.get_trusted_client_address(",".join(hosts))
        return ((host, port) if host else peer), scheme
