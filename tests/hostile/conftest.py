"""Fixtures of the hostile tests: a server of the examples, and a well-behaved client beside each attack."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from tests.server import Server, start_server

SLOWEST_MS = 500  # the promise is 50; a busy machine is not the server's fault
REST_SECONDS = 1.0


@dataclass
class Seen:
    """What an attack cost the others."""

    slowest_ms: float = 0.0
    grown_bytes: int = 0
    """By how much the resident memory of the server's processes grew, after a rest."""


Beside = Callable[..., AbstractContextManager[Seen]]

_rows: list[tuple[str, str, str, str]] = []  # of the table at the end


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what each attack cost, as a table in Markdown: the slowest step first."""
    if not _rows:
        return
    terminalreporter.section("what each attack cost a well-behaved client")
    heads = ("attack", "steps", "slowest step, ms", "memory, MB")
    for row in (heads, ("---", "---:", "---:", "---:"), *sorted(_rows, key=lambda row: -float(row[2]))):
        terminalreporter.write_line(f"| {' | '.join(row)} |")


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and of its children."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(resident_bytes(int(child)) for child in children)


@pytest.fixture(scope="module")
def server(examples: Path) -> Iterator[Server]:
    """A server of the example models, for one module's tests."""
    server = start_server("--models", str(examples), fresh=True)
    yield server
    assert server.stop() == 0


@pytest.fixture
def beside() -> Beside:
    """Runs an attack while a well-behaved client steps, who must not have noticed; what it cost is printed at the end.

    `with beside(server, "name of the attack") as seen: attack`; `headers` are the well-behaved client's own.
    """

    @contextmanager
    def beside(
        server: Server, name: str, model: str = "sunspots", step: Any = (0.25,), headers: dict[str, str] | None = None
    ) -> Iterator[Seen]:
        command = [sys.executable, "-m", "tests.hostile.neighbour", server.url, model, json.dumps(step)]
        neighbour = subprocess.Popen(
            [*command, json.dumps(headers or {})], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert neighbour.stdin and neighbour.stdout
        assert neighbour.stdout.readline() == "started\n"
        before, seen = resident_bytes(server.process.pid), Seen()
        try:
            yield seen
        finally:
            out, _ = neighbour.communicate(timeout=120)
        told = json.loads(out)
        time.sleep(REST_SECONDS)
        seen.slowest_ms, seen.grown_bytes = told["slowest_ms"], resident_bytes(server.process.pid) - before
        memory = f"{before / 1e6:.0f} -> {(before + seen.grown_bytes) / 1e6:.0f}"
        _rows.append((name.replace("|", r"\|"), str(told["steps"]), f"{seen.slowest_ms:.0f}", memory))
        assert not told["wrong"], told["wrong"][:3]
        assert seen.slowest_ms < SLOWEST_MS

    return beside
