"""The models of an LMDB environment's sessions: each has a number, which stands in the records."""

from __future__ import annotations

import struct
from typing import Any

import lmdb

from cellserve.service.sessions.stores.records import SessionRecord, UnreadableRecord

_NUMBER = struct.Struct(">I")


class ModelNumbers:
    """The models by their numbers, and the numbers by their models.

    Args:
        models: The database.
    """

    def __init__(self, models: Any) -> None:
        self._models = models
        self._known: dict[int, tuple[str, int, str]] = {}

    def model(self, transaction: lmdb.Transaction, number: int) -> tuple[str, int, str]:
        """Returns the name, version and digest of a model; raises UnreadableRecord."""
        known = self._known.get(number)
        if known is None:
            value: Any = transaction.get(b"#" + _NUMBER.pack(number), db=self._models, default=b"")
            try:
                name, version, digest = bytes(value).split(b"\0")
                known = name.decode(), int(version), digest.decode()
            except ValueError:
                raise UnreadableRecord("its model is not in the store") from None
            self._known[number] = known
        return known

    def number(self, transaction: lmdb.Transaction, session: SessionRecord) -> int:
        """Returns the number of a session's model, after adding it if necessary."""
        name = f"{session.model}\0{session.version}\0{session.digest}".encode()
        key = name[-64:] + name[:-64][:400]  # the digest first: a key has 511 bytes at most
        value = transaction.get(key, db=self._models)
        if value is not None and len(value) == _NUMBER.size:
            return int(_NUMBER.unpack(value)[0])
        number = transaction.stat(self._models)["entries"] // 2
        transaction.put(key, _NUMBER.pack(number), db=self._models)
        transaction.put(b"#" + _NUMBER.pack(number), name, db=self._models)
        return int(number)
