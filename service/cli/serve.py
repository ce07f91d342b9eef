"""`cellserve serve`: reads the settings from flags and the environment, runs uvicorn, ends with exit status 0."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from pydantic import ValidationError

from cellserve.service.observability import logging
from cellserve.service.settings import ENV_PREFIX, Settings

# A worker that has not said for so long that it lives is killed and started again: on a busy machine, or with a small
# share of one, its imports alone may take the 5 seconds that uvicorn would give it.
_WORKER_SECONDS = 30
_MEMORY = "/dev/shm"  # what workers tell each other for /metrics need not reach a disk

EXAMPLE = """\
example:
  cellserve serve --port 9000 --provider cpu
  CELLSERVE_PORT=9000 CELLSERVE_PROVIDER=cpu cellserve serve
"""


def parser(prog: str = "cellserve serve") -> argparse.ArgumentParser:
    """Makes the parser: a flag for each setting."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serves the models of a repository over HTTP. Every flag is an environment variable too.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in Settings.model_fields.items():
        told = f"{field.description} ({ENV_PREFIX}{name.upper()}; default: {field.default})"
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        parser.add_argument(f"--{name.replace('_', '-')}", help=told, default=argparse.SUPPRESS, **alone)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; gives the exit status: 0, 1 where it could not start, 2 for a bad setting."""
    given = vars(parser().parse_args(argv))
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        place = f"--{name.replace('_', '-')}" if name in given else f"{ENV_PREFIX}{name.upper()}"
        print(f"cellserve serve: {place}: {first['msg']}, got {first['input']!r}", file=sys.stderr)
        return 2
    if settings.workers > 1 and settings.store == "memory":
        print(
            "cellserve serve: --workers: each process would have sessions of its own: "
            "give them a shared store with --store redis://HOST:PORT",
            file=sys.stderr,
        )
        return 2
    if settings.workers > 1 and settings.grpc_port == 0:
        print("cellserve serve: --grpc-port: 0 would be another port in each of --workers: give one", file=sys.stderr)
        return 2
    ports: dict[int, str] = {}
    for name in ("port", "operations_port", "grpc_port"):
        flag, port = f"--{name.replace('_', '-')}", getattr(settings, name)
        if port and port in ports:
            print(f"cellserve serve: {flag}: {port} is {ports[port]} already: give it another", file=sys.stderr)
            return 2
        if port is not None:
            ports[port] = flag
    if settings.snapshot is not None and settings.store != "memory":
        print(
            "cellserve serve: --snapshot: the shared store keeps the sessions itself: leave one of the two out",
            file=sys.stderr,
        )
        return 2
    # Here and not above, so that --help and a mistyped flag answer at once.
    import uvicorn

    from cellserve.service.api.fast_path import FastPathHttp, FastPathWebSocket
    from cellserve.service.api.operations_listener import PortTaken, check_free
    from cellserve.service.app import create_app
    from cellserve.service.auth import BadKeysFile
    from cellserve.service.model_repository.repository import BrokenModel
    from cellserve.service.observability.prometheus import DIRECTORY
    from cellserve.service.runtime.onnx_model import RuntimeUnavailable
    from cellserve.service.sessions.stores.protocol import StoreUnusable
    from cellserve.service.sessions.stores.snapshot import BadSnapshot

    logging.configure(settings.log_format)
    try:
        for port, flag in ports.items():
            check_free(flag, settings.host, port)  # uvicorn would find it out when all models are loaded
        app = create_app(settings)
    except ModuleNotFoundError as error:
        parts = {
            "redis": ("--store", "redis"),
            "hiredis": ("--store", "redis"),
            "opentelemetry": ("--tracing", "tracing"),
        }
        setting, extra = parts.get((error.name or "").partition(".")[0], ("--grpc-port", "grpc"))
        print(f"cellserve serve: {setting} needs {error.name}: pip install 'cellserve[{extra}]'", file=sys.stderr)
        return 1
    except (BadKeysFile, BadSnapshot, BrokenModel, PortTaken, RuntimeUnavailable, StoreUnusable) as error:
        print(f"cellserve serve: {error}", file=sys.stderr)
        return 1
    how: dict[str, Any] = {
        "host": settings.host,
        "port": settings.port,
        "access_log": False,
        "timeout_graceful_shutdown": settings.shutdown_seconds,
        # Longer than clients and nginx (60 seconds) keep an idle connection: whoever sends over one in the moment in
        # which the server ends it has no answer.
        "timeout_keep_alive": 75,
        "server_header": False,
        "proxy_headers": False,  # nothing here asks who the client is
        "interface": "asgi3",
        "http": FastPathHttp,
        "ws": FastPathWebSocket,
        "ws_max_size": settings.max_body_bytes,
        "ws_per_message_deflate": False,
    }
    if settings.log_format == "json":
        how["log_config"] = None  # uvicorn's lines go where all others go
    if settings.workers > 1:
        # Each process makes its own; this one has found that it can be made.
        os.environ |= {f"{ENV_PREFIX}{name.upper()}": value for name, value in given.items()}
        try:
            folder = TemporaryDirectory(prefix="cellserve-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
        except OSError as error:
            print(
                f"cellserve serve: --workers need a folder to tell each other what they count: {error}", file=sys.stderr
            )
            return 1
        with folder:
            os.environ[DIRECTORY] = folder.name
            how["timeout_worker_healthcheck"] = _WORKER_SECONDS
            uvicorn.run("cellserve.service.app:from_environment", factory=True, workers=settings.workers, **how)
        return 0

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(app.service.exit_status)

    # uvicorn raises the signal again after a graceful stop; whoever asked for the stop is told that it went well.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server = uvicorn.Server(uvicorn.Config(app, **how))
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
