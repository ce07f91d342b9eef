"""Gives memory that the process has freed back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from cellserve.service.engine.state_arena import Arena

_GROWN_BYTES = 32 * 1024 * 1024  # growth after which it is worth looking for memory to give back
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Returns the process's resident memory; 0 where the system does not tell it."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


class MemoryTrimmer:
    """Trims the process's memory after a burst of work: arenas, and what the C library keeps of freed memory."""

    def __init__(self) -> None:
        # glibc gives freed memory back only where nothing behind it is in use, unless it is asked to.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._settled = resident_bytes()

    async def sweep(self, arenas: Iterable[Arena]) -> None:
        """Trims arenas, and freed memory if the process has grown since that was done last."""
        for arena in arenas:
            while arena.trim():
                await asyncio.sleep(0)
        if self._trim is not None and resident_bytes() - self._settled > _GROWN_BYTES:
            # On a thread, which ctypes lets run beside the event loop: it takes milliseconds.
            await asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
            self._settled = resident_bytes()
