"""A graph that ONNX Runtime crashes on costs a process of its own, and is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellserve.export.adopt import trial
from cellserve.export.adopt.trial import CannotOpen, CannotRun, Trial
from cellserve.export.errors import ExportError
from tests import foreign
from tests.export.adopting import Adopt

FEEDS = {"x": np.ones((2, 3), np.float32), "s": np.zeros((2, 4), np.float32)}


def test_runs_return_their_outputs_by_name() -> None:
    content = foreign.frames().SerializeToString()
    with Trial() as process:
        first, second = process.run(content, ["s.next", "y"], [FEEDS, FEEDS])
        assert (first["s.next"].shape, second["y"].shape) == ((2, 4), (2, 2))
        with pytest.raises(CannotOpen, match="cannot open the model"):
            process.run(b"no model", ["y"], [FEEDS])
        with pytest.raises(CannotRun, match="it does not run: "):
            process.run(content, ["y"], [{**FEEDS, "s": np.zeros((5, 4), np.float32)}])
        assert process.run(content, ["y"], [FEEDS])[0]["y"].shape == (2, 2)


WORKER = """
import os, pickle, signal, sys
pickle.load(sys.stdin.buffer)
{before}
os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize(
    ("before", "kind", "told"),
    [
        ("", CannotOpen, r"ONNX Runtime crashed \(SIGSEGV\) while it opened the graph"),
        ("pickle.dump(('opened',), sys.stdout.buffer); sys.stdout.flush()", CannotRun, "while it ran the graph"),
        ("os._exit(3)", CannotOpen, r"ONNX Runtime crashed \(exit status 3\)"),
    ],
)
def test_a_crash_is_reported_with_its_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, kind: Any, told: str
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(before=before))
    monkeypatch.setattr(trial, "_WORKER", worker)
    with Trial() as process, pytest.raises(kind, match=told):
        process.run(foreign.frames().SerializeToString(), ["y"], [FEEDS])


@pytest.fixture(name="trial")
def _trial() -> Iterator[Trial]:
    """One of each test's own: here it crashes."""
    with Trial() as trial:
        yield trial


def test_a_crash_ends_an_adoption_in_one_line_with_the_axis_to_fix(
    adopt: Adopt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(before=""))
    monkeypatch.setattr(trial, "_WORKER", worker)
    with pytest.raises(ExportError) as refused:
        adopt(foreign.lstm())
    told = (
        "ONNX Runtime crashed (SIGSEGV) while it opened the graph: if axis 1 of x is not time, fix its size with --dim"
    )
    assert str(refused.value) == f"cellserve adopt: {told} time=SIZE\n"
