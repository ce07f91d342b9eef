"""The command `cellserve serve`: reads settings from flags and the environment, and runs uvicorn."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from logging import getLogger
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cellserve.service.cli import workers
from cellserve.service.observability import logging
from cellserve.service.settings import ENV_PREFIX, TUNING, Settings, explain_invalid, flag, unknown_variables

if TYPE_CHECKING:
    from cellserve.service.api.middleware import ObservabilityMiddleware

EXAMPLE = """\
example:
  cellserve serve --port 9000 --provider cpu
  CELLSERVE_PORT=9000 CELLSERVE_PROVIDER=cpu cellserve serve

docs/reference/settings.md describes when to change each setting, and further settings for tuning.
"""


def parser(prog: str = "cellserve serve") -> argparse.ArgumentParser:
    """Returns a parser with a flag for each setting."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serves the models of a repository over HTTP. Every flag is an environment variable too.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in Settings.model_fields.items():
        description = f"{field.description} ({ENV_PREFIX}{name.upper()}; default: {field.default})"
        text = argparse.SUPPRESS if name in TUNING else description
        value: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(flag(name), help=text, default=argparse.SUPPRESS, **value)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is stopped; returns the exit status: 0, 1 if it could not start, 2 for an invalid setting."""
    given = vars(parser().parse_args(argv))
    try:
        settings = Settings(**given)
    except ValidationError as error:
        return _fail(explain_invalid(error, given), 2)
    # Here and not above, so that --help and a mistyped flag answer at once.
    from cellserve.service.api.connections.limits import raise_file_limit
    from cellserve.service.api.connections.ports import check_port
    from cellserve.service.app import CANNOT_START, create_app
    from cellserve.service.context import check_store
    from cellserve.service.sessions.stores.protocol import StoreUnusable

    logging.configure(settings.log_format)
    for message in unknown_variables(os.environ):
        getLogger("cellserve").warning(message)
    raise_file_limit()
    try:
        check_port("port", settings.host, settings.port)  # uvicorn only binds it after all models are loaded
        asyncio.run(check_store(settings))
        app = create_app(settings)
    except ModuleNotFoundError as error:
        return _fail(_missing_extra(error))
    except CANNOT_START as error:
        return _fail(str(error))
    if settings.workers == 1:
        return _run_one(app, settings)
    # What this process has opened was to find mistakes before there are workers.
    store = app.service.sessions
    asyncio.run(store.leave_to_workers())
    try:
        try:
            return workers.run(settings, given, _uvicorn_options(settings))
        except OSError as error:
            return _fail(f"--workers need a folder to share their metrics: {error}")
        finally:
            asyncio.run(store.close())
    except StoreUnusable as error:  # others have damaged it meanwhile
        return _fail(str(error))


def _run_one(app: ObservabilityMiddleware, settings: Settings) -> int:
    """Serves the application in this process."""
    import uvicorn

    from cellserve.service.cli.orderly_server import OrderlyServer

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    # uvicorn raises the signal again after a graceful stop, which would end the process as if it had failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server = OrderlyServer(uvicorn.Config(app, **_uvicorn_options(settings)))
    server.run()
    return 0 if server.started else 1


def _uvicorn_options(settings: Settings) -> dict[str, Any]:
    from cellserve.service.api.connections.bounded_websocket import BoundedWebSocket
    from cellserve.service.api.connections.fast_path_http import FastPathHttp

    options: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "access_log": False,
        "timeout_graceful_shutdown": settings.shutdown_seconds,
        "server_header": False,
        "proxy_headers": False,  # our protocols read them
        "interface": "asgi3",
        "http": FastPathHttp,
        "ws": BoundedWebSocket,
        "ws_ping_interval": settings.pong_seconds,
        "ws_ping_timeout": settings.pong_seconds,
        "ws_max_size": settings.max_body_bytes,
        "ws_per_message_deflate": False,
    }
    if settings.log_format == "json":
        options["log_config"] = None  # uvicorn's lines go through our handler
    return options


def _missing_extra(error: ModuleNotFoundError) -> str:
    """Returns which setting needs a missing package, and how to install it."""
    extras = {"redis": ("store", "redis"), "hiredis": ("store", "redis"), "opentelemetry": ("tracing", "tracing")}
    name, extra = extras.get((error.name or "").partition(".")[0], ("grpc_port", "grpc"))
    return f"{flag(name)} needs {error.name}: in a clone, pip install '.[{extra}]'"


def _fail(message: str, status: int = 1) -> int:
    print(f"cellserve serve: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
