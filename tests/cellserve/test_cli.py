"""The command `cellserve`: an unknown command is told with the one that was meant."""

from __future__ import annotations

import pytest

from cellserve.cli import main


@pytest.mark.parametrize(
    ("name", "said"), [("exprot", "'exprot' (did you mean export?): choose from"), ("zzz", "'zzz': choose from serve,")]
)
def test_an_unknown_command_is_told_with_the_one_that_was_meant(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
