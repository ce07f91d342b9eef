"""The watchdog: ends a worker that was stopped (SIGSTOP, a debugger) while it held the lock that all writers need.

LMDB's lock outlives a killed owner. A stopped one would hold it for ever, and every worker would wait for it.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

from cellserve.service.access.private_files import reserve_private
from cellserve.service.sessions.stores.protocol import StoreUnusable

_PLACES, _WATCHES = 512, 32  # processes, and watches of each
_BYTES = 4 * (_PLACES * (1 + _WATCHES) + 1)  # the last number is the server's process id
_PATIENCE_SECONDS = 1.5  # a write takes microseconds
_PERIOD_SECONDS = 0.5

log = logging.getLogger("cellserve")


class Watch:
    """A context manager: this process is in a write, or waits for the lock to begin it."""

    def __init__(self, cell: memoryview) -> None:
        self._cell = cell
        self.since = 0.0  # when the write began, in seconds of time.monotonic; 0 outside

    def __enter__(self) -> None:
        self._cell[0], self.since = 1, time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._cell[0], self.since = 0, 0.0


class Watchdog:
    """Notes in a file that all workers map which of them is in a write, and watches how long this one waits.

    Args:
        file: The file, made by `reserve`.

    Raises:
        StoreUnusable: The file is that of another server: the folder is not the one that this server began with.
    """

    @staticmethod
    def reserve(file: Path) -> None:
        """Makes the file of this server, before there are workers."""
        reserve_private(file, _BYTES)
        with _opened(file) as opened:
            opened.seek(_BYTES - 4)
            opened.write(os.getpid().to_bytes(4, sys.byteorder))

    def __init__(self, file: Path) -> None:
        self._watches: list[Watch] = []
        with _opened(file) as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            cells = memoryview(mmap.mmap(opened.fileno(), _BYTES)).cast("I")
            if cells[-1] != os.getppid():
                raise StoreUnusable(
                    f"--store: {file.parent} was replaced under this server: stop it, and start it again"
                )
            self._owners, self._writing = cells[:_PLACES], cells[_PLACES:-1]
            place = next(place for place, pid in enumerate(self._owners) if not pid or not _is_sibling(pid))
            self._own = self._writing[place * _WATCHES : (place + 1) * _WATCHES]
            for cell in range(_WATCHES):
                self._own[cell] = 0
            self._owners[place] = os.getpid()
            fcntl.flock(opened, fcntl.LOCK_UN)  # the map keeps the file open, and so would keep the lock
        threading.Thread(target=self._run, name="store watchdog", daemon=True).start()

    def watch(self) -> Watch:
        """Returns a watch for the writes of one thread."""
        watch = Watch(self._own[len(self._watches) : len(self._watches) + 1])
        self._watches.append(watch)
        return watch

    def _run(self) -> None:
        while True:
            time.sleep(_PERIOD_SECONDS)
            late = time.monotonic() - _PATIENCE_SECONDS
            if any(0 < watch.since < late for watch in list(self._watches)):
                self._end_stopped()

    def _end_stopped(self) -> None:
        for place, pid in enumerate(self._owners):
            writes = any(self._writing[place * _WATCHES : (place + 1) * _WATCHES])
            if writes and pid != os.getpid() and _is_sibling(pid) and _state(pid) in "Tt":
                log.error("worker %d was stopped in the middle of a write, which all others wait for: it is ended", pid)
                os.kill(pid, signal.SIGKILL)


def _opened(file: Path) -> IO[bytes]:
    return os.fdopen(os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b")


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat behind the process's name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["", ""]


def _state(pid: int) -> str:
    return _stat(pid)[0] or "-"


def _is_sibling(pid: int) -> bool:
    """Returns whether a process is a worker of the same server: its id may be another's by now."""
    return _stat(pid)[1] == str(os.getppid())
