"""A moment that a later process can tell its distance from, whatever happened to the wall clock in between."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Moment(msgspec.Struct, frozen=True):
    """When something was written."""

    wall: float  # seconds since the epoch, as the wall clock had it
    boot: Annotated[str, Meta(max_length=64)]  # which run of the machine; empty if the system does not tell
    uptime: float  # seconds since that run began, sleep included

    @classmethod
    def now(cls) -> Moment:
        """Returns the present."""
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        return cls(time.time(), boot, time.clock_gettime(time.CLOCK_BOOTTIME) if boot else 0.0)

    def elapsed(self) -> float:
        """Returns the seconds since then: by the uptime, or by the wall clock if the machine was started again."""
        now = Moment.now()
        if now.boot and now.boot == self.boot:
            return max(0.0, now.uptime - self.uptime)
        return max(0.0, now.wall - self.wall)
