"""Which client has made which sessions of an LMDB environment, and what they amount to."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import lmdb

_TOTAL = struct.Struct("<QQ")  # a client's sessions, and the bytes of their states


class ClientIndex:
    """The sessions of each client.

    Args:
        of_client: A database: a client, a zero byte, and the key of a session that it made.
        totals: A database: what the sessions of each client amount to.
    """

    def __init__(self, of_client: Any, totals: Any) -> None:
        self._of_client, self._totals = of_client, totals

    def add(self, transaction: lmdb.Transaction, client: bytes, key: bytes, state_bytes: int) -> None:
        """Adds a session."""
        transaction.put(client + b"\0" + key, b"", db=self._of_client)
        self._add_to_total(transaction, client, 1, state_bytes)

    def remove(self, transaction: lmdb.Transaction, client: bytes, key: bytes, state_bytes: int) -> None:
        """Removes a session."""
        transaction.delete(client + b"\0" + key, db=self._of_client)
        self._add_to_total(transaction, client, -1, -state_bytes)

    def total(self, transaction: lmdb.Transaction, client: bytes) -> tuple[int, int]:
        """Returns how many sessions a client has made, and the bytes of their states."""
        value = transaction.get(b"/" + client, db=self._totals)  # keys are not empty
        return (0, 0) if value is None or len(value) != _TOTAL.size else _TOTAL.unpack(value)

    def keys(self, transaction: lmdb.Transaction, client: bytes) -> Iterator[bytes]:
        """Iterates over the keys of a client's sessions."""
        prefix = client + b"\0"
        with transaction.cursor(db=self._of_client) as cursor:
            more = cursor.set_range(prefix)
            while more and (entry := bytes(cursor.key())).startswith(prefix):
                yield entry[len(prefix) :]
                more = cursor.next()

    def _add_to_total(self, transaction: lmdb.Transaction, client: bytes, sessions: int, state_bytes: int) -> None:
        count, size = self.total(transaction, client)
        if count + sessions > 0:
            total = _TOTAL.pack(count + sessions, max(0, size + state_bytes))
            transaction.put(b"/" + client, total, db=self._totals)
        else:
            transaction.delete(b"/" + client, db=self._totals)
