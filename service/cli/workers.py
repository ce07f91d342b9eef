"""Several server processes: the parent, what they share, and how each begins and ends."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellserve.service.observability import logging
from cellserve.service.settings import ENV_PREFIX, Settings

if TYPE_CHECKING:
    from uvicorn.supervisors.multiprocess import Process

    from cellserve.service.api.middleware import ObservabilityMiddleware

# uvicorn restarts a worker that does not answer its health check for so long. Its default is 5 seconds; on a busy
# machine, or with a small share of one, a worker's imports alone may take that long.
_HEALTH_SECONDS = 30
_MEMORY = Path("/dev/shm")  # a memory file system: metrics that workers share need no disk
_PREFIX = "cellserve-workers-"
_LAST_SECONDS = 5.0  # what a stop may take beyond `shutdown_seconds`


def run(settings: Settings, given: Mapping[str, str], uvicorn_options: dict[str, Any]) -> int:
    """Serves in several processes, each of which builds its own application; returns the exit status.

    Args:
        settings: The settings.
        given: Those that were given as flags.
        uvicorn_options: The options of each process's uvicorn.

    Raises:
        OSError: There is no folder for what they share.
    """
    import uvicorn
    from uvicorn.supervisors.multiprocess import Process

    from cellserve.service.observability.prometheus import DIRECTORY

    os.environ |= {f"{ENV_PREFIX}{name.upper()}": value for name, value in given.items()}
    with shared_folder(_MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())) as folder:
        os.environ[DIRECTORY] = str(folder)
        options = uvicorn_options | {"timeout_worker_healthcheck": _HEALTH_SECONDS}
        Process.start = _start  # type: ignore[assignment,method-assign]
        uvicorn.run(f"{__name__}:build", factory=True, workers=settings.workers, **options)
    return 0


def _start(worker: Process) -> None:
    """Starts a worker, and closes its end of the pipe here.

    With an end of its own the parent would not see that a worker has died that it is waiting for, and would wait for
    `_HEALTH_SECONDS`.
    """
    worker.process.start()
    worker.child_conn.close()


def build() -> ObservabilityMiddleware:
    """Builds a worker's application from the environment's settings."""
    from cellserve.service.app import CANNOT_START, create_app

    settings = Settings()
    _end_with_parent(settings.shutdown_seconds)
    logging.configure(settings.log_format)
    try:
        return create_app(settings)
    except CANNOT_START as error:  # something has changed since the parent tried it; uvicorn starts another worker
        getLogger("cellserve").error("a worker does not start: %s", error)
        raise SystemExit(1) from None


@contextmanager
def shared_folder(base: Path) -> Iterator[Path]:
    """Yields a new folder that is removed at the end; first removes those that killed servers have left."""
    _remove_abandoned(base)
    folder, lock = _new_folder(base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_folder(base: Path) -> tuple[Path, int]:
    """Returns a new folder, and its lock, which is held as long as this process lives and its descriptor is open."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another start took it for abandoned before it was locked
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(base: Path) -> None:
    """Removes the folders of this user that no process holds the lock of."""
    for folder in base.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.geteuid():
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its server runs
        finally:
            os.close(lock)


def _end_with_parent(shutdown_seconds: float) -> None:
    """Stops this worker, as SIGTERM does, when its parent is gone: nobody else would ever stop or replace it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(shutdown_seconds + _LAST_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
