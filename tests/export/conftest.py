"""What the tests of the export share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cellserve.export.adopt.trial import Trial
from cellserve.export.cli.adopt import main
from cellserve.export.errors import ExportError
from cellserve.service.model_repository.model import Model
from cellserve.service.model_repository.repository import load
from cellserve.service.runtime.onnx_model import RuntimeOptions
from tests.export.adopting import Adopt
from tests.export.unmeasured import unmeasured


@pytest.fixture(scope="session")
def trial() -> Iterator[Trial]:
    """The process in which adopted graphs are tried: to start one for each would take more time than the rest."""
    with Trial() as trial:
        yield trial


@pytest.fixture
def adopt(tmp_path: Path, capsys: pytest.CaptureFixture[str], trial: Trial, monkeypatch: pytest.MonkeyPatch) -> Adopt:
    """Writes a model to a file, runs the command on it, and opens what came out as the service does."""
    monkeypatch.setattr("cellserve.export.adopt.adopt.Trial", lambda: nullcontext(trial))

    def run(made: Any, *flags: str) -> Model:
        path = tmp_path / "model.onnx"
        path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
        artifacts = tmp_path / "artifacts"
        if main([str(path), "--name", "mine", "--models", str(artifacts), *flags]) != 0:
            assert not list(artifacts.glob("mine/*")), "something was written"
            raise ExportError(capsys.readouterr().err)
        newest = max((artifacts / "mine").iterdir(), key=lambda folder: int(folder.name))
        return load("mine", newest, RuntimeOptions(), 16)

    return run


@pytest.fixture
def measuring() -> None:
    """For tests of what is measured."""


@pytest.fixture(autouse=True)
def _unmeasured(request: pytest.FixtureRequest) -> Iterator[None]:
    if "measuring" in request.fixturenames:
        yield
        return
    with unmeasured():
        yield
