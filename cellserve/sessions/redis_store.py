"""A Redis as a place with sessions; apart from the other store, since its packages are an extra."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from cellserve.service.sessions.session import Durable
from cellserve.service.sessions.stores.protocol import StoreClient, StoreUnusable
from cellserve.service.sessions.stores.records import SessionRecord, TombstoneRecord, UnreadableRecord
from cellserve.service.sessions.stores.redis_client import RedisClient
from cellserve.service.sessions.stores.redis_reader import ListedKey, RedisReader
from cellserve.service.settings import Settings
from cellserve.sessions.errors import SessionsError
from cellserve.sessions.models import Models
from cellserve.sessions.place import Listed
from cellserve.sessions.stores import Store


class RedisStore(Store):
    """The sessions in a Redis; a `Place`. Servers may use it at the same time, while it is written too.

    Args:
        settings: Those of the servers that use it, from the environment, with its URL.
        models: The models of its sessions.
    """

    durable: Durable = "store"

    def __init__(self, settings: Settings, models: Models) -> None:
        parts = urlsplit(settings.store)
        super().__init__(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", models)
        self._settings = settings
        try:
            self._reader = RedisReader(settings.store, settings.store_timeout_seconds)
        except StoreUnusable as error:
            raise SessionsError(str(error)) from None

    def sessions(self) -> Iterator[Listed]:
        """Iterates over the sessions of all owners."""
        listing = self._reader.sessions()

        async def following() -> ListedKey | None:
            return await anext(listing, None)

        while (one := self._run(following())) is not None:
            if isinstance(one.summary, UnreadableRecord):
                yield Listed(one.key, unreadable=str(one.summary))
            else:
                yield Listed(one.key, *one.summary, expires_in=one.expires_in)

    def close(self) -> None:
        """Closes the connections."""
        self._run(self._reader.close())
        super().close()

    def _find(self, name: str) -> tuple[SessionRecord | TombstoneRecord | None, float]:
        return self._run(self._reader.find(name))

    def _open(self) -> StoreClient:
        settings = self._settings
        times = settings.session_idle_seconds, settings.tombstone_seconds, settings.store_timeout_seconds
        try:
            client = RedisClient(settings.store, *times, settings.store_replicas)
        except StoreUnusable as error:
            raise SessionsError(str(error)) from None
        self._run(client.check())
        return client
