"""Nothing that is started contacts a host that nobody named, or leaves anything in the user's home."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cellserve.cli import COMMANDS

# What the tests themselves have set is not for the commands to inherit.
CLEAN = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
LONG_ENOUGH = 12  # seconds: without the variable ONNX Runtime 1.32 looks its host up within 9

WATCH = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("onnxruntime, ORT_DISABLE_TELEMETRY =", os.environ.get("ORT_DISABLE_TELEMETRY"), flush=True)
            os._exit(0)  # what comes after its import takes seconds and tells nothing more

sys.meta_path.insert(0, Watch())
"""


WITHOUT_RUNTIME = {"cellserve.benchmark.command", "cellserve.models.training_cli", "cellserve.sessions.command"}
RUN_MODELS = [
    *sorted({module for module, _, _ in COMMANDS.values()} - WITHOUT_RUNTIME),
    "cellserve.service.app",
    "bench",
]


@pytest.mark.parametrize("module", RUN_MODELS)
def test_telemetry_is_off_before_onnx_runtime_is_imported(module: str) -> None:
    imports = f"importlib.import_module({module!r}); import onnxruntime"
    done = subprocess.run([sys.executable, "-c", WATCH + imports], env=CLEAN, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["onnxruntime, ORT_DISABLE_TELEMETRY = 1"], done.stderr


def test_a_server_looks_up_no_name_connects_to_no_host_and_keeps_nothing_in_the_home(
    repository: Path, tmp_path: Path
) -> None:
    strace = shutil.which("strace")
    assert strace, "strace is missing: `make test` installs it, or apt-get install strace"
    home, calls = tmp_path / "home", tmp_path / "calls"
    home.mkdir()
    command = [strace, "-f", "-qq", "-o", str(calls), "-e", "trace=listen,connect,sendto,sendmsg,sendmmsg"]
    command += [sys.executable, "-m", "cellserve.cli", "serve", "--models", str(repository), "--port", "0"]
    server = subprocess.Popen(
        command, env={**CLEAN, "HOME": str(home)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stderr
    log = ""
    while "running on" not in log:
        line = server.stderr.readline()
        assert line, f"the server did not start:\n{log}"
        log += line
    time.sleep(LONG_ENOUGH)
    os.killpg(server.pid, signal.SIGTERM)
    server.communicate(timeout=60)
    addresses = re.findall(r'sa_family=AF_INET6?, .*?(?:inet_addr\(|inet_pton\(AF_INET6, )"([^"]+)"', calls.read_text())
    assert "listen(" in calls.read_text(), "strace has not seen the server"
    assert not [address for address in addresses if address not in ("127.0.0.1", "::1")]
    assert not list(home.iterdir())
