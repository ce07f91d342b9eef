"""Files with states or keys: readable by their owner alone, and never written through a link that somebody laid."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

_MODE = 0o600
# Without O_NONBLOCK, opening a pipe would wait for its reader.
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def create_private(path: Path) -> IO[bytes]:
    """Opens a new file for writing, in place of any file or link of that name; raises OSError."""
    with suppress(FileNotFoundError):
        path.unlink()
    return os.fdopen(os.open(path, _FLAGS | os.O_EXCL, _MODE), "wb")


def check_file(path: Path, most_bytes: int | None = None) -> None:
    """Raises OSError if there is something at a path that is no file of at most so many bytes, or a link."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is a link or no file")
        if most_bytes is not None and status.st_size > most_bytes:
            raise OSError(f"{path} has {status.st_size} bytes, more than {most_bytes}")


def reserve_private(path: Path, size: int) -> None:
    """Makes a file at least this long, with all of that on disk.

    For files that are mapped: a write to a part that is not on disk ends the process (SIGBUS) when the disk is full.
    """
    with append_private(path) as file:
        missing = size - os.fstat(file.fileno()).st_size
        if missing > 0:
            file.write(bytes(missing))


def append_private(path: Path) -> IO[bytes]:
    """Opens a file for appending, and creates it if it is missing; others cannot read it any more.

    Raises:
        OSError: It cannot be opened, or is a link or no file.
    """
    file = os.fdopen(os.open(path, _FLAGS | os.O_APPEND, _MODE), "ab")
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a file")
        os.fchmod(file.fileno(), _MODE)
    except OSError:
        file.close()
        raise
    return file
