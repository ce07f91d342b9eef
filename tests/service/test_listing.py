"""`cellserve models`: what a repository holds, for people and for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from cellserve.models.signature import METADATA_KEY, MODEL_NAME
from cellserve.service.cli.models import main
from tests.versions import add_version, changed

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


def test_what_a_model_says_of_itself_steers_no_terminal(
    models: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def steer(proto: onnx.ModelProto) -> None:
        [entry] = [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]
        document = json.loads(entry.value)
        entry.value = json.dumps(document | {"form": "\x1b[31m\r\nlstm  9", "metrics": {"[bold]\x1b]0;title\x07": 1}})

    def refused(proto: onnx.ModelProto) -> None:
        [entry] = [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]
        entry.value = json.dumps(json.loads(entry.value) | {"\x1b[31m\n": 1})

    for version, change in ((2, steer), (3, refused)):
        add_version(models, "lstm", version, changed(models / "lstm/1" / MODEL_NAME, change))
    assert main(["--models", str(models)]) == 0
    out, [told] = capsys.readouterr().out, [record.getMessage() for record in caplog.records if record.levelno >= 40]
    assert not set(out + told) & set("\x1b\x07\r")
    assert out.count("\n") == 3 and "[bold]" in out
    assert "lstm/3 is refused" in told and "\n" not in told


def test_json_has_what_get_models_says_of_each(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--models", str(models), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["models"]
    assert [(each["name"], each["version"]) for each in told] == [(NAME, 1), ("lstm", 1)]
    assert told[1]["signature"]["inputs"][0]["shape"] == [5]
    assert told[1]["exact"] is True
    assert {"exactness", "digest", "provider", "labels", "parity", "provenance"} <= told[1].keys()
