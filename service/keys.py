"""Who may: API keys, known by their SHA-256 only, each belonging to an owner of sessions."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from pathlib import Path

from service.errors import Unauthorized

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")
_REMEMBERED = 4096  # keys that need not be compared with every line again

log = logging.getLogger("cellserve")


class BadKeysFile(Exception):
    """The file of API keys cannot be read; the message says where."""


class Keys:
    """The keys of a file: lines `owner:sha256`, the hash in hexadecimal, and `#` comments.

    Args:
        path: The file; it is read again whenever it has changed.

    Raises:
        BadKeysFile: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed: tuple[int, int] = (0, 0)
        self._lines: list[tuple[str, bytes]] = []
        self._owners: dict[bytes, str] = {}
        self.reload()

    def owner(self, authorization: bytes | None) -> str:
        """Gives the owner whose key an `Authorization` header bears (RFC 6750, section 2.1).

        Raises:
            Unauthorized: It bears none, or one that is not known.
        """
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise Unauthorized("this server wants a key: send it with Authorization: Bearer KEY")
        digest = hashlib.sha256(token.strip()).digest()
        owner = self._owners.get(digest)
        if owner is None:
            # All lines are compared, each in constant time, so that the time tells nothing of how near a key is.
            matches = [name for name, known in self._lines if hmac.compare_digest(digest, known)]
            if not matches:
                raise Unauthorized("the key is not known here: ask whoever runs this server for another")
            if len(self._owners) >= _REMEMBERED:
                self._owners.clear()
            owner = self._owners[digest] = matches[0]
        return owner

    def reload(self) -> None:
        """Reads the file again where it has changed; raises BadKeysFile, and keeps the keys that it had."""
        try:
            told = self._path.stat()
            if (told.st_mtime_ns, told.st_size) == self._changed:
                return
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadKeysFile(f"{self._path}: {error}") from None
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                found = _LINE.fullmatch(line.strip())
                if found is None:
                    raise BadKeysFile(
                        f"{self._path}, line {number}: it is not owner:sha256: make one with `cellserve key`"
                    )
                lines.append((found[1], bytes.fromhex(found[2])))
        self._changed = told.st_mtime_ns, told.st_size
        self._lines, self._owners = lines, {}

    def keep_up(self) -> None:
        """Reads the file again where it has changed; a file that is wrong is told of in the log."""
        try:
            self.reload()
        except BadKeysFile as bad:
            log.error("the keys stay as they were: %s", bad)
