"""Fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cellserve.service.engine.engine import Engine
from cellserve.service.sessions.stores.memory import MemoryStore
from cellserve.service.sessions.writer import SessionWriter
from tests.service.helpers import machinery


@pytest.fixture
def make() -> Callable[..., tuple[Engine, MemoryStore, SessionWriter]]:
    """Gives what makes all of it."""
    return machinery
