"""The command `cellserve`: what it prints without a command, and with one that there is not."""

from __future__ import annotations

import importlib.metadata
import re

import pytest

from cellserve.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("name", "said"), [("exprot", "'exprot' (did you mean export?): choose from"), ("zzz", "'zzz': choose from serve,")]
)
def test_an_unknown_command_is_reported_with_the_one_that_was_meant(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_without_a_command_it_prints_commands_to_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    named = re.findall(r"^  cellserve (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert named == ["examples", "export", "adopt", "serve"]
    assert set(named) <= set(COMMANDS)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cellserve {importlib.metadata.version('cellserve')}\n"
