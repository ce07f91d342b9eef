"""What `cellserve adopt` leaves for people: its stages, its last lines, and report.html."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx.helper import make_node as node

from cellserve.export.adopt import adopt
from cellserve.export.cli.adopt import main
from tests import foreign
from tests.export.pages import Page
from tests.foreign import FLOAT

HOSTILE = "<img src=x onerror=\"alert(1)\"> & 'more'"


def hostile() -> Any:
    """`h.next = x gain + h`; the input has a name that a page must escape."""
    return foreign.model(
        [node("Mul", [HOSTILE, "gain"], ["louder"]), node("Add", ["louder", "h"], ["h.next"]),
         node("Identity", ["h.next"], ["y"])],
        [(HOSTILE, FLOAT, ["batch", 1, 3]), ("h", FLOAT, ["batch", 1, 3]), ("gain", FLOAT, [3])],
        [("y", FLOAT, ["batch", 1, 3]), ("h.next", FLOAT, ["batch", 1, 3])],
    )  # fmt: skip


def test_the_end_names_the_report_and_the_command_that_serves_the_model(tmp_path: Path, capsys: Any) -> None:
    path, artifacts = tmp_path / "model.onnx", tmp_path / "my artifacts"
    onnx.save(hostile(), path)
    flags = ["--constant", "gain=[1, 2, 3]", "--description", HOSTILE]
    assert main([str(path), "--name", "mine", "--models", str(artifacts), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = artifacts / "mine" / "1" / "report.html"
    assert lines[-2:] == [f"report {report} in a browser", f"serve  cellserve serve --models '{artifacts}'"]
    stages = [line.split("s  ")[1] for line in lines if re.match(r" *[\d.]+ s  ", line)]
    assert stages == [
        "reading the graph",
        "finding its outputs",
        "comparing with the original graph",
        "proving that neither batch nor chunks change a bit",
        "measuring",
    ]
    text = report.read_text()
    page = Page(text)
    assert "<img" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    for told in (
        HOSTILE,
        "axis 1, of size one, is dropped",
        "gain = [1.0, 2.0, 3.0]",
        "h → h.next",
        "Proved for runs in any shape.",
    ):
        assert told in page.text
    assert "Keras" not in page.text


def test_labels_are_checked_before_the_proof(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(foreign.frames(), path)
    assert main([str(path), "--name", "mine", "--models", str(tmp_path / "a"), "--labels", "a,b,c"]) == 1
    ran = capsys.readouterr()
    assert "3 labels for an output of shape [2]" in ran.err
    assert "comparing" not in ran.out


def test_an_unforeseen_error_is_reported_in_one_line(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_roles(*_: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(adopt, "find_roles", find_roles)
    path = tmp_path / "model.onnx"
    onnx.save(foreign.frames(), path)
    assert main([str(path), "--name", "mine", "--models", str(tmp_path / "a")]) == 1
    told = "cellserve adopt: the model cannot be adopted: KeyError: 'x'; please report it with the model\n"
    assert capsys.readouterr().err == told


def test_a_mistyped_name_is_reported_with_the_one_that_was_meant(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(foreign.deep(), path)
    assert main([str(path), "--name", "mine", "--models", str(tmp_path / "a"), "--state", "stat=stateN"]) == 1
    assert "no such input 'stat' (did you mean state?): the candidates are input, state" in capsys.readouterr().err
