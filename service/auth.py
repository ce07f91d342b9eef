"""API keys, stored as SHA-256 hashes, and the owners of sessions they belong to."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from pathlib import Path

from cellserve.service.errors import Unauthorized

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")
_REMEMBERED = 4096  # keys in the cache of known keys

log = logging.getLogger("cellserve")


class BadKeysFile(Exception):
    """The file of API keys cannot be read, or has an invalid line at the start; the message says where."""


class Keys:
    """The keys of a file: lines `owner:sha256`, the hash in hexadecimal, and `#` comments.

    Args:
        path: The file; `reload_if_changed` reads it again.

    Raises:
        BadKeysFile: It cannot be read, or has an invalid line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed: tuple[int, int] = (0, 0)
        self._last_logged_error = ""
        self._lines: list[tuple[str, bytes]] = []
        self._owners: dict[bytes, str] = {}
        bad = self._reload()
        if bad:
            raise BadKeysFile(bad[0])

    def owner(self, authorization: bytes | None) -> str:
        """Returns the owner of the key in an `Authorization` header (RFC 6750, section 2.1).

        Raises:
            Unauthorized: There is no key, or an unknown one.
        """
        scheme, _, token = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not token.strip():
            raise Unauthorized("this server needs a key: send it with Authorization: Bearer KEY")
        digest = hashlib.sha256(token.strip()).digest()
        owner = self._owners.get(digest)
        if owner is None:
            # Comparing with every line in constant time keeps the duration from revealing how close a guess is.
            matches = [name for name, known in self._lines if hmac.compare_digest(digest, known)]
            if not matches:
                raise Unauthorized("the key is unknown: ask this server's operator for one")
            if len(self._owners) >= _REMEMBERED:
                self._owners.clear()
            owner = self._owners[digest] = matches[0]
        return owner

    def reload_if_changed(self) -> None:
        """Reads the file again if it has changed, and logs once what is wrong with it.

        Valid lines take effect even if others are invalid: a broken line must not keep a key alive whose own line was
        deleted. While the file cannot be read at all, the keys stay as they were.
        """
        try:
            bad = self._reload()
            self._last_logged_error = ""
        except BadKeysFile as unreadable:
            if str(unreadable) != self._last_logged_error:
                log.error("the keys stay as they were: %s", unreadable)
            self._last_logged_error = str(unreadable)
        else:
            for line in bad:
                log.error("%s; the other lines take effect", line)

    def _reload(self) -> list[str]:
        """Reads the file if it has changed; returns a message for each invalid line.

        Raises:
            BadKeysFile: The file cannot be read; the keys stay as they were.
        """
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_size) == self._changed:
                return []
            text = self._path.read_bytes().decode(errors="replace")
        except OSError as error:
            raise BadKeysFile(f"{self._path}: {error.strerror}") from None
        lines, bad = [], []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                found = _LINE.fullmatch(line.strip())
                if found is None:
                    bad.append(f"{self._path}, line {number}: not owner:sha256: make such a line with `cellserve key`")
                else:
                    lines.append((found[1], bytes.fromhex(found[2])))
        self._changed = stat.st_mtime_ns, stat.st_size
        self._lines, self._owners = lines, {}
        return bad
