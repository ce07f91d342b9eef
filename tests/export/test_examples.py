"""`cellserve examples`: the example models, trained and exported, and served meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from cellserve.export.cli.examples import main
from cellserve.models.training_cli import EXAMPLES
from cellserve.service.runtime.onnx_model import Runtime


@pytest.mark.long
def test_an_example_is_trained_exported_and_then_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cellserve.models import training

    schedule = training.Schedule
    monkeypatch.setattr(training, "Schedule", lambda epochs, **more: schedule(1, **more))
    command = ["sunspots", "--models", str(tmp_path / "models"), "--folder", str(tmp_path / "trained")]
    assert main(command) == 0
    *_, last = capsys.readouterr().out.splitlines()
    version = tmp_path / "models/sunspots/1"
    assert re.fullmatch(rf"sunspots +\d+ s  {version} is ready: test .*rmse \d+.*", last)
    assert Runtime(version / "model.onnx").document.rollout == "value"  # the card beside the network was read
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert main(command) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_an_unknown_example_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vowel"]) == 2
    assert capsys.readouterr().err == f"cellserve examples: no example 'vowel': one of {', '.join(EXAMPLES)}\n"


def test_what_is_there_is_served_while_the_rest_is_made_and_a_stop_ends_all(examples: Path, tmp_path: Path) -> None:
    shutil.copytree(examples / "sunspots", tmp_path / "models/sunspots")
    process = subprocess.Popen(
        [sys.executable, "-m", "cellserve.cli", "examples", "--serve", "--models", str(tmp_path / "models")],
        cwd=tmp_path,
        env={**os.environ, "CELLSERVE_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    told = ""
    for line in process.stdout:
        told += line
        found = re.search(r"running on (http://\S+)", told)
        if found and re.search("^vowels +0 s  importing TensorFlow$", told, re.MULTILINE):
            break
    assert found, told
    with httpx.Client(base_url=found[1], timeout=60) as client:
        answer = client.post("/predict", json={"model": "sunspots", "sequences": [[[96.7]]]})
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # until all processes that can write have ended
    assert (answer.status_code, process.returncode) == (200, 0)
    assert {path.name for path in (tmp_path / "models").rglob(".draft*")} == set()
