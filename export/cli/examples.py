"""The command `cellserve examples`: trains and exports the example models, side by side, and may serve them."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cellserve.export.errors import ExportError
from cellserve.models.signature import default_repository
from cellserve.models.training_cli import EXAMPLES

EPILOG = """\
example:
  cellserve examples
  cellserve examples vowels
  cellserve examples --serve

Makes those that the repository does not have yet: FOLDER/NAME.keras as `cellserve train` does, then its model as
`cellserve export` does.
"""

_BETWEEN_LINES = 5.0  # seconds between two lines of progress
_BETWEEN_LOOKS = 0.2  # seconds
_NICENESS = 5  # of all examples but the first, so that it and then the server come first


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="cellserve examples",
        description="Trains the example networks on real data and exports them, as many at a time as there are cores.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help=f"which: {', '.join(EXAMPLES)} (default: all)")
    add("--folder", type=Path, default=Path("trained"), help="the folder of the networks (default: trained)")
    add("--models", type=Path, default=default_repository(),
        help="the model repository (CELLSERVE_MODELS; default: artifacts)")  # fmt: skip
    add("--serve", action="store_true", help="run `cellserve serve` as soon as there is a model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status, with `--serve` that of the server."""
    arguments = parser().parse_args(argv)
    folder, models = arguments.folder, arguments.models
    unknown = [name for name in arguments.names if name not in EXAMPLES]
    if unknown:
        print(f"cellserve examples: no example {unknown[0]!r}: one of {', '.join(EXAMPLES)}", file=sys.stderr)
        return 2
    missing = [name for name in arguments.names or EXAMPLES if not _has_versions(models / name)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left half done, here and below
    if len(missing) == 1 and not arguments.serve:
        return _make(missing[0], folder, models)
    return _make_side_by_side(missing, folder, models, arguments.serve)


def _has_versions(home: Path) -> bool:
    return any(path.name.isdigit() for path in home.glob("*"))


def _make_side_by_side(waiting: list[str], folder: Path, models: Path, serve: bool) -> int:
    """Makes examples in processes of their own, the first ones first, and runs the server beside them."""
    places = ["--folder", str(folder), "--models", str(models)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    server: subprocess.Popen[bytes] | None = None
    first, status = waiting[:1], 0
    try:
        while waiting or running or (serve and server is None):
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                name = waiting.pop(0)
                running[name] = _start("examples", name, *places)
                if [name] != first:
                    os.setpriority(os.PRIO_PROCESS, running[name].pid, _NICENESS)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    status = status or process.returncode
            if serve and server is None:
                if any(map(_has_versions, models.glob("*"))):
                    server = _start("serve", "--models", str(models))
                elif not waiting and not running:
                    return status
            if server is not None and server.poll() is not None:
                break
            time.sleep(_BETWEEN_LOOKS)
        return server.wait() if server else status
    except KeyboardInterrupt:
        if server is None:
            return 130
        server.terminate()
        return server.wait()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-P", "-m", "cellserve.cli", *command])


def _make(name: str, folder: Path, models: Path) -> int:
    """Trains and exports one example, with a line every few seconds."""
    tell = _Progress(name)
    try:
        tell("importing TensorFlow")
        from cellserve.models.tensorflow_import import import_tensorflow

        import_tensorflow()
        from cellserve.export.exporter import write_model
        from cellserve.export.publish.request import ExportRequest
        from cellserve.models.training import save, train

        network = folder / f"{name}.keras"
        if not network.exists():
            save(train(name, lambda done, of, figure: tell(f"trained {done} of {of} epochs, {figure}")), folder, name)
        tell("exporting", at_once=True)
        request = ExportRequest(network, name, models, version=1)
        written, results = write_model(request, lambda stage: tell(f"exporting: {stage}"))
    except (ExportError, ImportError, OSError) as error:
        print(f"cellserve examples: {name}: {error}", file=sys.stderr)
        return 1
    metrics = ", ".join(f"{metric} {value:.4g}" for metric, value in results.document.metrics.items())
    tell(f"{written} is ready: test {metrics}", at_once=True)
    return 0


class _Progress:
    """Prints lines about one example, not more often than a reader needs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began, self._told = time.monotonic(), 0.0

    def __call__(self, what: str, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._told >= _BETWEEN_LINES:
            self._told = now
            print(f"{self._name:16} {now - self._began:4.0f} s  {what}", flush=True)
