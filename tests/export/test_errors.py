"""What a library raises anywhere in an export ends in one line that names the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tests.networks  # noqa: F401  imports TensorFlow quietly

import keras  # isort: skip
from keras import layers  # isort: skip

import pytest

from cellserve.export import exporter
from cellserve.export.cli.export import main
from cellserve.export.errors import did_you_mean, explain_unforeseen, note_layer


@keras.saving.register_keras_serializable("tests")
class Moody(layers.Layer):
    """Works while the network is built, and then no more."""

    def call(self, x: Any) -> Any:
        if not isinstance(x, keras.KerasTensor) and x.shape[0] is not None:
            raise ValueError("not today. Perhaps tomorrow\nor later")
        return x


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main([str(folder / "mine.keras"), "--name", "mine", "--models", str(folder)]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "Traceback" not in line
    return line


def test_what_a_layer_raises_is_reported_with_the_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keras.Sequential([keras.Input((None, 2)), Moody(name="moody"), layers.LSTM(2)]).save(tmp_path / "mine.keras")
    line = refused(tmp_path, capsys)
    assert "layer 'moody' (Moody)" in line
    assert "not today" in line


def test_what_is_raised_elsewhere_is_reported_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keras.Sequential([keras.Input((None, 2)), layers.LSTM(2)]).save(tmp_path / "mine.keras")

    def fails(model: Any) -> None:
        raise KeyError("h")

    monkeypatch.setattr(exporter, "network_of", fails)
    assert "cannot be exported: KeyError: 'h'; please report it" in refused(tmp_path, capsys)


def test_the_innermost_layer_is_the_one_that_is_named() -> None:
    error = ValueError("no")
    for layer in ("layer 'inner' (Dense)", "layer 'outer' (RNN)"):
        note_layer(error, layer)
    assert explain_unforeseen(error).startswith("layer 'inner' (Dense) cannot be exported, it raises ValueError: no")


def test_only_a_similar_word_is_offered() -> None:
    assert did_you_mean("--nmae", ["--name", "--data"]) == " (did you mean --name?)"
    assert did_you_mean("--zzz", ["--name", "--data"]) == ""
