"""The stages of an export are shown from the first second, with and without a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from cellserve.export.report.progress import Stages


def test_without_a_terminal_each_stage_is_one_line_with_the_seconds_so_far() -> None:
    written = io.StringIO()
    with Stages(Console(file=written, width=20)) as stage:
        stage("importing TensorFlow")
        assert re.fullmatch(r" *\d+\.\d s  importing TensorFlow\n", written.getvalue())
        stage("loading [mine].keras")
    assert written.getvalue().splitlines()[1].endswith(" s  loading [mine].keras")


def test_on_a_terminal_the_stages_are_a_list_that_vanishes() -> None:
    written = io.StringIO()
    with Stages(Console(file=written, width=80, force_terminal=True)) as stage:
        stage("importing TensorFlow")
        stage("loading [mine].keras")
    assert "✓ importing TensorFlow" in written.getvalue().replace("\x1b[32m", "").replace("\x1b[0m", "")
    assert "loading [mine].keras" in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K")
