"""Addresses of peers, as limits by client count them."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

Address = tuple[str, int] | None  # host and port; None where the peer has none (a Unix socket)

_IPV6_NETWORK = 64  # bits: the smallest network that is handed out (RFC 6177); all its addresses are one client


@lru_cache(4096)
def host_identity(host: str) -> str:
    """Returns the identity of a host: an IPv4 address itself, the network of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _IPV6_NETWORK), strict=False))
