"""`cellserve models`: what a repository holds, for people and for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cellserve.service.cli.models import main

NAME = "a-model-with-a-name-as-long-as-names-may-be-which-is-64-letters"


@pytest.fixture
def models(repository: Path, tmp_path: Path) -> Path:
    shutil.copytree(repository / "rnn", tmp_path / NAME)
    shutil.copytree(repository / "lstm", tmp_path / "lstm")
    return tmp_path


def test_nothing_is_cut_or_wrapped_for_a_pipe(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", str(models)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["model", "version", "takes"]
    assert [row.split()[0] for row in rows] == [NAME, "lstm"]
    assert "x [5]" in rows[0]


def test_json_has_what_get_models_says_of_each(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", str(models), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["models"]
    assert [(each["name"], each["version"]) for each in told] == [(NAME, 1), ("lstm", 1)]
    assert told[1]["signature"]["inputs"][0]["shape"] == [5]
    assert told[1]["exact"] is True
    assert {"exactness", "digest", "provider", "labels", "parity", "provenance"} <= told[1].keys()
