"""Who may: API keys, known by their SHA-256 only, each belonging to an owner of sessions."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from pathlib import Path

from cellserve.service.errors import Unauthorized

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")
_REMEMBERED = 4096  # keys that need not be compared with every line again

log = logging.getLogger("cellserve")


class BadKeysFile(Exception):
    """The file of API keys cannot be read, or at the start has a bad line; the message says where."""


class Keys:
    """The keys of a file: lines `owner:sha256`, the hash in hexadecimal, and `#` comments.

    Args:
        path: The file; it is read again whenever it has changed.

    Raises:
        BadKeysFile: It cannot be read, or has a bad line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed: tuple[int, int] = (0, 0)
        self._told = ""  # what the file was last said to be unreadable for
        self._lines: list[tuple[str, bytes]] = []
        self._owners: dict[bytes, str] = {}
        bad = self._reload()
        if bad:
            raise BadKeysFile(bad[0])

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

    def keep_up(self) -> None:
        """Reads the file again where it has changed, and tells of what is wrong in it once.

        The sound lines count: a line that nobody can read must not keep a key alive whose own line is gone. Of a file
        that cannot be read nothing is known, and the keys stay as they were.
        """
        try:
            bad = self._reload()
            self._told = ""
        except BadKeysFile as unreadable:
            if str(unreadable) != self._told:
                log.error("the keys stay as they were: %s", unreadable)
            self._told = str(unreadable)
        else:
            for line in bad:
                log.error("%s; the other lines count", line)

    def _reload(self) -> list[str]:
        """Reads the file where it has changed; gives what is wrong with each bad line.

        Raises:
            BadKeysFile: The file is gone or cannot be read; the keys are those that were.
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
                    bad.append(f"{self._path}, line {number}: it is not owner:sha256: make one with `cellserve key`")
                else:
                    lines.append((found[1], bytes.fromhex(found[2])))
        self._changed = stat.st_mtime_ns, stat.st_size
        self._lines, self._owners = lines, {}
        return bad
