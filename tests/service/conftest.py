"""Fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from cellserve.service.engine.engine import Engine
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.writer import SessionWriter
from tests.service.helpers import machinery


@pytest.fixture(params=[False, True], ids=["host", "device"])
def make(request: pytest.FixtureRequest) -> Callable[..., tuple[Engine, MemoryStore, SessionWriter]]:
    """Gives what makes all of it, with states in host memory and on a device."""
    return partial(machinery, on_device=request.param)
