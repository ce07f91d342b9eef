"""What all surfaces share: the settings, the models, an engine for each, and the sessions."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from service.engine import Engine
from service.repository import Repository
from service.runtime import RuntimeOptions
from service.sessions import SessionTable
from service.settings import Settings

_NICE = 10


def _yield_to_the_event_loop() -> None:
    """Lets the event loop go first where it shares a core with this thread, whose runs are the long ones."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class Service:
    """One process's service.

    Args:
        settings: Its settings.

    Raises:
        BrokenModel: There is no model to serve.
        RuntimeUnavailable: The provider that was asked for is not to be had.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        options = RuntimeOptions(
            settings.provider, settings.threads, settings.spinning, settings.memory_arena, settings.optimization
        )
        self.repository = Repository(settings.models, options, settings.max_batch)
        self._executor = ThreadPoolExecutor(1, "tick", _yield_to_the_event_loop)
        self.engines = {name: Engine(model, settings, self._executor) for name, model in self.repository.models.items()}
        self.sessions = SessionTable(settings.max_sessions, settings.session_idle_seconds, settings.tombstone_seconds)
        for engine in self.engines.values():
            self.sessions.serve(engine)
        self.ready = False

    def engine(self, model: str | None) -> Engine:
        """Gives the engine of a model; raises UnknownModel as `Repository.get` does."""
        return self.engines[self.repository.get(model).name]

    def close(self) -> None:
        """Stops what runs beside the event loop."""
        self.ready = False
        self._executor.shutdown()
