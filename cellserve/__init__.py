"""The Python client of Cellserve, and its command line (`cellserve.cli`). Names are imported when they are first used.

The client is written once, in `_async`; `_sync` is generated from it by `scripts/unasync.py`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellserve._async.client import AsyncClient as AsyncClient
    from cellserve._sync.client import Client as Client
    from cellserve.errors import CellserveError as CellserveError
    from cellserve.retry import Retry as Retry
    from cellserve.retry import Timeout as Timeout

_HOMES = {
    "AsyncClient": "cellserve._async.client",
    "CellserveError": "cellserve.errors",
    "Client": "cellserve._sync.client",
    "Retry": "cellserve.retry",
    "Timeout": "cellserve.retry",
}
__all__ = ["AsyncClient", "CellserveError", "Client", "Retry", "Timeout"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cellserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
