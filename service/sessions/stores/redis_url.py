"""The client of redis-py that a `--store` URL names: one Redis, one behind Sentinels, or a cluster."""

from __future__ import annotations

import re
from typing import Any, cast
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cellserve.service.sessions.stores.protocol import StoreUnusable

_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
_SENTINEL_PORT = 26379


def connect(url: str, timeout_seconds: float) -> Redis | RedisCluster:
    """Returns the client for a URL; it connects when it is first used.

    Args:
        url: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://` for TLS, `unix://PATH[?db=DB]`,
            `redis+sentinel://HOST[:PORT][,HOST[:PORT]...]/NAME[/DB]`, `redis+cluster://HOST[:PORT]`. Options of
            redis-py may follow a question mark.
        timeout_seconds: How long connecting and each call may take.

    Raises:
        StoreUnusable: The URL is wrong. The message repeats none of it, since it may hold a password.
    """
    # The client must not retry: whether a write without an answer was applied has to be looked up.
    how: dict[str, Any] = {"socket_timeout": timeout_seconds, "socket_connect_timeout": timeout_seconds}
    how["retry"] = Retry(NoBackoff(), 0)
    try:
        parts = urlsplit(url)
        scheme, _, kind = parts.scheme.partition("+")
        if parts.scheme not in _SCHEMES:
            raise StoreUnusable(
                f"--store: send memory, lmdb:FOLDER, or a URL that starts with {', '.join(_SCHEMES)}, and ://"
            )
        if any("@" in part for part in (parts.path, parts.query, parts.fragment)):
            raise ValueError  # the password ends where one of its characters is taken for the end of the host
        if kind == "sentinel":
            client: Any = _behind_sentinels(parts, scheme, how)
        elif kind == "cluster":
            if parts.path not in ("", "/", "/0"):
                raise StoreUnusable("--store: a cluster has no databases but 0: leave out what follows the port")
            client = RedisCluster.from_url(parts._replace(scheme=scheme, path="").geturl(), **how)
        else:
            if scheme != "unix":
                _database(parts.path)
                parts.port  # noqa: B018  # raises ValueError
            client = Redis.from_url(url, **how)
        if kind != "cluster":
            client.connection_pool.make_connection()  # raises TypeError for an option that there is none of
    except (ValueError, TypeError, RedisError):
        # Their messages repeat parts of the URL.
        raise StoreUnusable(
            "--store: its URL is not valid: in user and password, percent-encode every character but letters, digits "
            "and -._~ (: is %3A, / is %2F, @ is %40, # is %23); HOST:PORT/DB follow, then options that redis-py has"
        ) from None
    return client  # type: ignore[no-any-return]


def _database(path: str) -> int:
    """Returns the number of a URL's database, 0 if there is none."""
    if not re.fullmatch(r"/?|/[0-9]{1,9}", path):
        raise StoreUnusable("--store: what follows HOST:PORT/ is the number of a database: 0 or another whole number")
    return int(path[1:] or 0)


def _behind_sentinels(parts: SplitResult, scheme: str, how: dict[str, Any]) -> Redis:
    """Returns the client of the primary that Sentinels name; user and password are those of Redis."""
    name, _, database = unquote(parts.path[1:]).partition("/")
    if not name:
        raise StoreUnusable("--store: the name that the Sentinels know the primary by is missing: HOST:PORT/NAME")
    credentials, _, hosts = parts.netloc.rpartition("@")
    sentinels = []
    for host in hosts.split(","):
        one = urlsplit(f"//{host}")
        if not one.hostname:
            raise ValueError
        sentinels.append((one.hostname, one.port or _SENTINEL_PORT))
    # redis-py reads everything else, as in the URL of a single Redis.
    alone = Redis.from_url(SplitResult(scheme, f"{credentials}@host", "", parts.query, "").geturl(), **how)
    options = alone.connection_pool.connection_kwargs | {"db": _database(f"/{database}"), "ssl": scheme == "rediss"}
    del options["host"]
    connect_by: Any = Sentinel
    return cast(Redis, connect_by(sentinels, **how).master_for(name, **options))
