"""Who a client is."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cellserve.service.api.client_identity import TrustedProxies, client_of, grpc_peer, peer_of
from cellserve.service.settings import Settings


def test_a_client_is_its_owner_or_its_address() -> None:
    assert client_of("alice", {"client": ("10.0.0.7", 5)}) == "alice"
    assert client_of("", {"client": ("10.0.0.7", 5)}) == peer_of({"client": ("10.0.0.7", 6)}) == "10.0.0.7"
    assert peer_of({"client": None}) == peer_of({}) == ""


def test_an_ipv6_network_is_one_client() -> None:
    one, same, other = (peer_of({"client": (host, 1)}) for host in ("2001:db8::1", "2001:db8::2:3", "2001:db8:0:1::1"))
    assert one == same != other
    assert peer_of({"client": ("::ffff:10.0.0.7", 1)}) == "10.0.0.7"


def test_grpc_names_the_same_clients() -> None:
    assert grpc_peer("ipv4:10.0.0.7:50712") == "10.0.0.7"
    assert grpc_peer("ipv6:%5B2001:db8::1%5D:1") == peer_of({"client": ("2001:db8::1", 1)})
    assert grpc_peer("unix-abstract:cellserve-0f/10.0.0.7:2") == "10.0.0.7"
    assert grpc_peer("unix-abstract:cellserve-0f/2001:db8::1:2") == peer_of({"client": ("2001:db8::1", 1)})


def test_only_trusted_proxies_say_who_the_client_is() -> None:
    proxies = TrustedProxies("10.0.0.7,10.1.0.0/16")
    peer = ("10.1.2.3", 5)
    assert peer in proxies and ("10.2.0.1", 5) not in proxies and None not in proxies
    headers = [(b"x-forwarded-for", b"6.6.6.6, 1.2.3.4, 10.0.0.7"), (b"x-forwarded-proto", b"https")]
    assert proxies.forwarded(peer, headers) == (("1.2.3.4", 0), "https")
    assert proxies.forwarded(peer, []) == (peer, "http")
    assert ("127.0.0.1", 5) not in TrustedProxies("")


def test_a_mistyped_proxy_is_refused() -> None:
    with pytest.raises(ValidationError, match="is not an address or network"):
        Settings(trusted_proxies="10.0.0.7,proxy.example")
