"""What pages in a browser may ask for."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cellserve.service.api.browser_rules import BrowserRules
from cellserve.service.errors import Forbidden, Misdirected
from cellserve.service.settings import Settings

OWN = "http://127.0.0.1:8000"


def allowed(kind: str = "websocket", scheme: str = "http", rules: BrowserRules | None = None, **headers: str) -> bool:
    rules = rules or BrowserRules("", "https://good.example, HTTP://Fine.example:81")
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"headers": [(b"host", b"127.0.0.1:8000"), *named], "scheme": scheme}
    scope |= {"type": "websocket"} if kind == "websocket" else {"type": "http", "method": kind}
    try:
        rules.check(scope)
    except (Forbidden, Misdirected):
        return False
    return True


@pytest.mark.parametrize("kind", ["websocket", "POST", "PUT", "DELETE", "PATCH"])
def test_sockets_and_changes_are_for_pages_of_allowed_origins_with_their_schemes(kind: str) -> None:
    assert all(allowed(kind, origin=origin) for origin in (OWN, "https://good.example", "http://fine.example:81"))
    foreign = (
        "null", "https://evil.example", "http://good.example", "https://good.example:81", "https://127.0.0.1:8000",
        "http://127.0.0.1", "http://127.0.0.1:8000.evil.example", "http://good.example@evil.example",
    )  # fmt: skip
    assert not any(allowed(kind, origin=origin) for origin in foreign)
    assert allowed(kind, "https", origin="https://127.0.0.1:8000") and not allowed(kind, "https", origin=OWN)
    assert allowed(kind)
    assert allowed(kind, origin="https://127.0.0.1:8000", sec_fetch_site="same-origin")
    assert not allowed(kind, origin="https://127.0.0.1:8000", sec_fetch_site="same-site")


def test_reading_is_left_to_the_browser() -> None:
    assert all(allowed(kind, origin="https://evil.example") for kind in ("GET", "HEAD", "OPTIONS"))


def test_hosts_are_names_that_are_allowed_or_addresses() -> None:
    rules = BrowserRules("api.example, Other.example")
    fine = ("api.example", "API.example:8000", "other.example", "127.0.0.1:8000", "[::1]:8000", "[::1]", "localhost:80")
    for host in fine:
        assert rules.allows_host(host.lower()) and allowed(rules=rules, host=host), host
    for host in (
        "evil.example",
        "evil.example:8000",
        "api.example.evil.example",
        "127.0.0.1.evil.example",
        "localhost:evil",
        "127.0.0.1]",
        "[127.0.0.1",
        "localhost:80:evil",
    ):
        assert not rules.allows_host(host) and not allowed(rules=rules, host=host), host
    assert BrowserRules("").allows_host("evil.example")
    assert rules.take_fast_path([(b"host", b"API.example:8000")])
    assert not rules.take_fast_path([(b"host", b"evil.example")]) and not rules.take_fast_path([(b"origin", b"x")])


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_origins": "good.example"},
        {"allowed_origins": "https://good.example/"},
        {"allowed_origins": "*"},
        {"allowed_hosts": "api.example:8000"},
        {"allowed_hosts": "https://api.example"},
        {"root_path": "models"},
        {"root_path": "/models/"},
    ],
)
def test_mistyped_origins_hosts_and_paths_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)  # type: ignore[arg-type]
