"""API keys, stored as SHA-256 hashes, and the owners of sessions they belong to."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from cellserve.service.access.peer_address import host_identity
from cellserve.service.errors import TooManyWrongKeys, Unauthorized

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")
_MOST_BYTES = 16 * 1024 * 1024  # of the file
_MOST_BAD = 20  # lines of the file that are named
_REMEMBERED = 4096  # keys, pairs of address and key, and addresses with wrong keys
_WRONG_AT_ONCE, _WRONG_SECONDS = 10, 6.0  # an address may send so many wrong keys, then one every so many seconds

log = logging.getLogger("cellserve")


class BadKeysFile(Exception):
    """The file of API keys cannot be read, or has an invalid line at the start; the message says where."""


class WrongKeys:
    """The addresses that have sent wrong keys lately, and how long each has to wait.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._forgotten_at: dict[str, float] = {}  # by address; its last wrong key moves it to the end

    def __bool__(self) -> bool:
        return bool(self._forgotten_at)

    def add(self, address: str) -> None:
        """Counts a wrong key."""
        now = self._clock()
        self._forgotten_at[address] = max(now, self._forgotten_at.pop(address, now)) + _WRONG_SECONDS
        if len(self._forgotten_at) > _REMEMBERED:
            del self._forgotten_at[next(iter(self._forgotten_at))]

    def wait(self, address: str) -> float:
        """Returns the seconds until a key from an address is compared again; 0 if it is at once."""
        forgotten_at = self._forgotten_at.get(address)
        if forgotten_at is None:
            return 0.0
        return max(0.0, forgotten_at - self._clock() - (_WRONG_AT_ONCE - 1) * _WRONG_SECONDS)

    def sweep(self) -> None:
        """Forgets the addresses whose wrong keys were long ago."""
        now = self._clock()
        for address in [one for one, forgotten_at in self._forgotten_at.items() if forgotten_at <= now]:
            del self._forgotten_at[address]


class HeldKey:
    """The key of a connection that outlives requests: revoked, it ends the connection.

    Args:
        digest: The key's.
        owner: Its owner.
        end: Ends the connection; called with the reason once the key is revoked, or belongs to another owner.
    """

    def __init__(self, digest: bytes, owner: str, end: Callable[[Unauthorized], object]) -> None:
        self.digest, self.owner, self.end = digest, owner, end

    def replace(self, authorization: bytes) -> None:
        """Holds another key of the same owner from now on."""
        self.digest = _digest(authorization)


class Keys:
    """The keys of a file: lines `owner:sha256`, the hash in hexadecimal, and `#` comments.

    Args:
        path: The file; `reload_if_changed` reads it again.
        clock: Returns seconds.

    Raises:
        BadKeysFile: It cannot be read, or has an invalid line.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._read: tuple[int, int, int] | None = None  # what identifies the file that was read last
        self._seen: tuple[int, int, int] | None = None  # and the file at the last look
        self._last_logged_error = ""
        self._lines: list[tuple[str, bytes]] = []
        self._valid: set[tuple[str, bytes]] = set()  # the same
        self._owners: dict[bytes, str] = {}  # by digest: the keys in use
        self._wrong = WrongKeys(clock)
        self._used: dict[tuple[str, bytes], None] = {}  # addresses and the keys that they have used
        self._held: set[HeldKey] = set()
        bad = self._reload()
        if bad:
            raise BadKeysFile(bad[0])

    def known(self, authorization: bytes | None, host: str) -> str:
        """Returns the owner of a key that is in use; counts nothing, for callers that ask `owner` otherwise.

        Raises:
            Unauthorized: The key is not in use, or has to be asked for by `owner`.
        """
        digest = _digest(authorization)
        owner = self._owners.get(digest)
        if owner is None or (self._wrong and self._wait(host, digest)):
            raise Unauthorized("the key is not in use")
        return owner

    def owner(self, authorization: bytes | None, host: str) -> str:
        """Returns the owner of the key in an `Authorization` header (RFC 6750, section 2.1).

        Args:
            authorization: The header.
            host: The client's address. Those that send many wrong keys have to wait: only the keys that an address has
                used before are taken from it meanwhile, so that nobody locks others at the same address out.

        Raises:
            Unauthorized: There is no key, or an unknown one.
            TooManyWrongKeys: The address has sent too many wrong keys.
        """
        digest = _digest(authorization)
        wait = self._wait(host, digest) if self._wrong else 0.0
        if wait:
            raise TooManyWrongKeys(math.ceil(wait))
        owner = self._owners.get(digest)
        if owner is None:
            # Comparing with every line in constant time keeps the duration from revealing how close a guess is.
            matches = [name for name, known in self._lines if hmac.compare_digest(digest, known)]
            if not matches:
                self._wrong.add(host_identity(host))
                raise Unauthorized("the key is unknown: ask this server's operator for one")
            if len(self._owners) >= _REMEMBERED:
                self._owners.clear()
            owner = self._owners[digest] = matches[0]
        use = host_identity(host), digest
        if use not in self._used:
            if len(self._used) >= _REMEMBERED:
                del self._used[next(iter(self._used))]
            self._used[use] = None
        return owner

    def _wait(self, host: str, digest: bytes) -> float:
        address = host_identity(host)
        return 0.0 if (address, digest) in self._used else self._wrong.wait(address)

    @contextmanager
    def held(self, authorization: bytes | None, owner: str, end: Callable[[Unauthorized], object]) -> Iterator[HeldKey]:
        """Calls `end` when an owner's key is revoked, within the context."""
        held = HeldKey(_digest(authorization), owner, end)
        self._held.add(held)
        try:
            if self._is_revoked(held):
                self._end(held)
            yield held
        finally:
            self._held.discard(held)

    def _is_revoked(self, held: HeldKey) -> bool:
        return (held.owner, held.digest) not in self._valid

    def _end(self, held: HeldKey) -> None:
        self._held.discard(held)
        held.end(Unauthorized("the key was revoked: send a valid one"))

    def end_revoked(self, most: int) -> bool:
        """Ends at most so many connections that hold revoked keys; returns whether more may be left."""
        revoked = list(islice(filter(self._is_revoked, self._held), most))
        for held in revoked:
            self._end(held)
        return len(revoked) == most

    def reload_if_changed(self) -> None:
        """Reads the file again if it has changed since it was read, and not since the last call; logs what is wrong.

        What empties a file and then fills it, as editors do, is so not taken for one that revokes all keys.
        Valid lines take effect even if others are invalid: a broken line must not keep a key alive whose own line was
        deleted. While the file cannot be read at all, the keys stay as they were.
        """
        self._wrong.sweep()
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
        """Reads the file if it is a new one, and complete; returns a message for each invalid line.

        Raises:
            BadKeysFile: The file cannot be read; the keys stay as they were.
        """
        try:
            # Opening a pipe that nobody writes to would block for ever otherwise.
            with open(self._path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
                status = os.fstat(file.fileno())
                stamp = status.st_mtime_ns, status.st_size, status.st_ino
                is_complete = self._read is None or stamp == self._seen
                self._seen = stamp
                if stamp == self._read or not is_complete:
                    return []
                if not stat.S_ISREG(status.st_mode):
                    raise BadKeysFile(f"--api-keys-file {self._path}: this is not a file: give one with keys")
                text = file.read(_MOST_BYTES + 1).decode(errors="replace")
        except OSError as error:
            raise BadKeysFile(f"--api-keys-file {self._path}: {error.strerror}") from None
        if len(text) > _MOST_BYTES:
            raise BadKeysFile(f"--api-keys-file {self._path}: more than {_MOST_BYTES} bytes: is it another file?")
        lines, bad = [], []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                found = _LINE.fullmatch(line.strip())
                if found is None:
                    bad.append(f"{self._path}, line {number}: not owner:sha256: make such a line with `cellserve key`")
                else:
                    lines.append((found[1], bytes.fromhex(found[2])))
        if len(bad) > _MOST_BAD:
            bad = [*bad[:_MOST_BAD], f"{self._path}: {len(bad) - _MOST_BAD} further lines are not owner:sha256"]
        self._read = stamp
        self._lines, self._valid, self._owners = lines, set(lines), {}
        digests = {digest for _, digest in lines}
        self._used = {use: None for use in self._used if use[1] in digests}
        return bad


def _digest(authorization: bytes | None) -> bytes:
    """Returns the SHA-256 of the key in an `Authorization` header; raises Unauthorized if there is none."""
    scheme, _, token = (authorization or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        raise Unauthorized("this server needs a key: send it with Authorization: Bearer KEY")
    return hashlib.sha256(token.strip()).digest()
