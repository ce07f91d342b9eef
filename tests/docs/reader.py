"""A reader who does what a page says: runs its snippets as they stand, in their order, in one folder.

Only addresses differ: each port of the page is a free one. `stand_ins/` holds the commands that behave otherwise here.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from tests.docs.snippets import Snippet, same, snippets
from tests.helpers import ROOT, free_port
from tests.redis_server import RedisServer

_ADDRESS = re.compile(r"(localhost:|127\.0\.0\.1:|--(?:grpc-|operations-)?port[ =]|listen )(\d{4})\b")
_STAND_INS = Path(__file__).parent / "stand_ins"


class Reader:
    """Someone with a clone and its models, in a folder of their own.

    Args:
        folder: Where they work; what the page makes stays there.
        models: A model repository, of which they have a copy, as `make serve` leaves it.
        not_run: What is not run, by its reason: patterns of lines of shell snippets.
        engine: The program that runs containers, in place of `docker`.
    """

    def __init__(self, folder: Path, models: Path, not_run: dict[str, str], engine: str | None = None) -> None:
        self.folder, self.not_run = folder, not_run
        self.ports: dict[str, str] = {}
        self.redis: RedisServer | None = None
        self.servers = folder / ".servers"
        self.servers.mkdir()
        shutil.copytree(models, folder / "artifacts")
        (folder / "trained").symlink_to(ROOT / "trained")
        shutil.copytree(ROOT / "deploy", folder / "deploy")
        for file in (folder / "deploy").rglob("*.conf"):
            file.write_text(self._here(file.read_text()).replace("/tmp/nginx", str(folder / "nginx")))
        (folder / ".venv").mkdir()
        (folder / ".venv/bin").symlink_to(_STAND_INS)
        node = re.match(r"v(\d+)", _printed("node", "--version"))
        assert node, "node is missing: `make test` installs it, or apt-get install nodejs node-ws"
        if (
            int(node[1]) < 20
        ):  # no WebSocket of its own; Debian's node 18 finds this package beside a file that imports it
            (folder / "node_modules").mkdir()
            (folder / "node_modules/ws").symlink_to("/usr/share/nodejs/ws")
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(_STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHON": sys.executable,
            "COLUMNS": "200",
            "ENGINE": engine or "",
            "CLONE": str(ROOT),
            "SERVERS": str(self.servers),
            "CELLSERVE_PORT": self._port("8000"),
            # Its WebSocket needs a flag in Node 20 and 21.
            "NODE_OPTIONS": "--experimental-websocket" if node[1] in ("20", "21") else "",
        }

    def read(self, page: Path) -> None:
        """Runs all of a page, in a new shell and a new Python."""
        with _Shell(self.folder, self.environment) as shell:
            names: dict[str, Any] = {"__name__": "__main__"}
            for snippet in self._all(page, shell):
                where = f"{page.name}, line {snippet.line}"
                text = self._here(snippet.text)
                if snippet.file:
                    (self.folder / snippet.file).write_text(text)
                elif snippet.language == "python":
                    self._check(where, snippet, _run_python(text, where, names))
                elif snippet.language == "sh":
                    self._check(where, snippet, shell.run(self._runnable(text), where))
            # Snippets leave clients open, as people at a prompt do.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                names.clear()
                gc.collect()

    def _all(self, page: Path, shell: _Shell) -> list[Snippet]:
        """A page's snippets, once the servers run that it does not start itself."""
        found = snippets(page)
        if not self.redis and any("redis://" in snippet.text for snippet in found if snippet.language == "sh"):
            (self.folder / ".redis").mkdir()
            self.redis = RedisServer(self.folder / ".redis")
            self.ports["6379"] = str(self.redis.port)
        starts = any(re.search(r"^\S*(cellserve|make) serve", snippet.text, re.M) for snippet in found)
        runs = any(snippet.language in ("python", "sh") and not snippet.file for snippet in found)
        if runs and not starts and not list(self.servers.glob("*.log")):
            shell.run(self._here("cellserve serve --grpc-port 8001"), f"{page.name}, which starts no server")
        return found

    def close(self) -> None:
        """Ends what the page has started."""
        if self.redis:
            self.redis.stop()
        for server in self.servers.iterdir():
            if server.suffix != ".log":
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(server.read_text()), signal.SIGKILL)

    def _check(self, where: str, snippet: Snippet, printed: str) -> None:
        if snippet.output is None:
            assert "urn:cellserve:problem" not in printed, f"{where}: {printed}"
        else:
            assert same(snippet.output, printed), f"{where} shows\n{snippet.output.text}\nand printed\n{printed}"

    def _runnable(self, text: str) -> str:
        """A shell snippet without what is not run."""
        lines = re.findall(r"(?:.*\\\n)*.*\n?", text)
        return "".join(line for line in lines if not any(re.search(pattern, line) for pattern in self.not_run))

    def _here(self, text: str) -> str:
        """A text with the ports of this reader."""
        return _ADDRESS.sub(lambda found: found[1] + self._port(found[2]), text)

    def _port(self, told: str) -> str:
        return self.ports.setdefault(told, str(free_port()))


class _Shell:
    """One bash, as a reader has one terminal: variables that a snippet sets are there in the next."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.files = {name: folder / ".servers" / f"{name}.log" for name in ("snippet", "out", "errors", "failed")}
        self.process = subprocess.Popen(
            ["bash"], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _Shell:
        self._do(f"set -E; trap 'echo \"$BASH_COMMAND\" >>{self.files['failed']}' ERR")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def run(self, text: str, where: str) -> str:
        """Runs a snippet and returns what it printed; no command of it may fail."""
        self.files["snippet"].write_text(text)
        self.files["failed"].write_text("")
        self._do(f"source {self.files['snippet']} >{self.files['out']} 2>{self.files['errors']}; wait")
        out, errors, failed = (self.files[name].read_text() for name in ("out", "errors", "failed"))
        assert not failed, f"{where}: {failed}failed:\n{out}{errors}"
        return out

    def _do(self, command: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{command}\necho done\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


def _run_python(text: str, where: str, names: dict[str, Any]) -> str:
    """Runs a Python snippet with the names of those before it, and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, where, "exec"), names)
    return printed.getvalue()


def _printed(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
