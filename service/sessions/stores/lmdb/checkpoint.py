"""Checkpoints: what a store that does not sync each commit goes back to after a power cut.

Without a sync per commit the system may write pages in any order, so that after a power cut LMDB's own roots may point
to pages that never arrived. A checkpoint syncs the file once, and saves the root of that moment in a file beside it.
A read transaction keeps its pages from being reused until the next checkpoint, so that going back is writing the saved
root over LMDB's. It is what libmdbx calls MDBX_SAFE_NOSYNC.
"""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from cellserve.service.access.private_files import reserve_private
from cellserve.service.sessions.stores.protocol import StoreUnusable

_FILE = "checkpoint"
_BYTES = 4096  # of the file: a block
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# MDB_meta behind the header of pages 0 and 1: magic, version, address, map size, free list, main tree, last page, id of
# the transaction. The first number of the free list is the size of a page. See mdb.c of LMDB 0.9.
_META = struct.Struct("<IIQQ48s48sQQ")
_PAGE_HEADER = 16
_MAGIC, _VERSION = 0xBEEFC0DE, 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The root of an LMDB file at a moment at which all of it was on disk."""

    boot: str  # id of the machine's run in which it was written
    at: float  # seconds since the epoch
    clean: bool  # whether the store was closed then
    root: str  # LMDB's root in hexadecimal; empty if the store takes no checkpoints

    def save(self, folder: Path) -> None:
        """Replaces the checkpoint in a folder atomically, and syncs it.

        The file that it replaces is kept for the next one, so that there is always a block for it on a full disk: the
        store needs checkpoints to reuse its pages.
        """
        content = orjson.dumps(asdict(self))
        content = content.ljust(_BYTES - 2 * hashlib.sha256().digest_size - 1)
        new = folder / f"{_FILE}.new"
        reserve_private(new, _BYTES)
        with new.open("r+b") as file:
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            file.flush()
            os.fsync(file.fileno())
        spare = folder / f"{_FILE}.spare"
        spare.unlink(missing_ok=True)
        with suppress(OSError):  # there is none yet, or the file system knows no links
            os.link(folder / _FILE, spare)
        new.replace(folder / _FILE)
        sync_folder(folder)
        with suppress(OSError):
            if spare.exists():
                spare.replace(new)
            else:
                reserve_private(new, _BYTES)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint | None:
        """Reads a folder's checkpoint; returns None if there is none. Raises StoreUnusable if it is damaged."""
        try:
            digest, _, content = (folder / _FILE).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise StoreUnusable(f"--store: {folder / _FILE} is damaged: restore the folder from a backup")
        return cls(**orjson.loads(content))

    @property
    def went_down(self) -> bool:
        """Whether the machine went down while the store was in use: changes since this checkpoint may be in part."""
        return not self.clean and self.boot != boot_id()


def boot_id() -> str:
    """Returns what identifies this run of the machine: another one after each start."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def read_root(data: int, transaction: int) -> str:
    """Returns the root, in hexadecimal, that a transaction has committed; call it while nothing can commit.

    Args:
        data: File descriptor of LMDB's file.
        transaction: The id of the transaction, which is the last one or the one before.
    """
    first = os.pread(data, _PAGE_HEADER + _META.size, 0)[_PAGE_HEADER:]
    root = os.pread(data, _META.size, transaction % 2 * _page_size(first) + _PAGE_HEADER)
    assert _META.unpack(root)[7] == transaction
    return root.hex()


def recover(folder: Path) -> Checkpoint | None:
    """Takes a store that the machine went down with back to its checkpoint; call it before LMDB opens the store.

    Returns:
        The checkpoint, if the store went back to it.

    Raises:
        StoreUnusable: There is nothing to go back to.
    """
    found = Checkpoint.load(folder)
    if found is None or not found.went_down:
        return None
    if not found.root:
        raise StoreUnusable(
            f"--store: the machine went down while {folder} was in use without checkpoints, so only a part of the last "
            f"changes may be on disk: restore a backup, or give another folder to start empty"
        )
    root = bytes.fromhex(found.root)
    data = os.open(folder / "data.mdb", os.O_RDWR)
    try:
        for page in range(2):
            os.pwrite(data, root, page * _page_size(root) + _PAGE_HEADER)
        os.fsync(data)
    finally:
        os.close(data)
    return found


def forget(folder: Path) -> None:
    """Removes a folder's checkpoint: from here on each commit is synced."""
    (folder / _FILE).unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _page_size(root: bytes) -> int:
    magic, version, _, _, free, *_ = _META.unpack(root)
    if (magic, version) != (_MAGIC, _VERSION):
        raise StoreUnusable("--store: the folder's file is not LMDB's, or of another version of LMDB")
    return int(struct.unpack_from("<I", free)[0])
