"""A file that Keras cannot load is reported in one line that says what it is and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tests.networks  # noqa: F401  imports TensorFlow quietly

import keras  # isort: skip
from keras import layers  # isort: skip

import zipfile
from pathlib import Path

import pytest

from cellserve.export.cli.export import main


def saved(path: Path, *inner: Any) -> bytes:
    keras.Sequential([keras.Input((None, 2)), *inner, layers.LSTM(2)]).save(path)
    return path.read_bytes()


class Unregistered(layers.Layer):
    def call(self, x: Any) -> Any:
        return x


class Elsewhere(layers.Layer):
    def call(self, x: Any) -> Any:
        return x


@keras.saving.register_keras_serializable("tests")
class Shifted(layers.Layer):
    """Gives no argument of its constructor in its config."""

    def __init__(self, by: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.by = by

    def call(self, x: Any) -> Any:
        return x + self.by

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name}


def squared(x: Any) -> Any:
    return x * x


def registered_elsewhere(path: Path) -> None:
    # To register it would be for the whole process, the loading too: the name is written by hand instead.
    saved(path, Elsewhere())
    files = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    files["config.json"] = files["config.json"].replace(
        b'"registered_name": "Elsewhere"', b'"registered_name": "theirs>Elsewhere"'
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def no_config(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no network")


def incomplete_config(path: Path) -> None:
    saved(path, Shifted(1.0))


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a file": (lambda path: path.write_bytes(saved(path)[:2000]), "an incomplete one"),
    "Python code": (lambda path: path.write_text("import keras"), "it is not a .keras archive"),
    "another archive": (no_config, "it is not a .keras archive"),
    "a class": (lambda path: saved(path, Unregistered()), "class 'Unregistered' was not registered when"),
    "a class of a file": (registered_elsewhere, "class 'Elsewhere' (registered as 'theirs>Elsewhere') is not"),
    "a function": (lambda path: saved(path, layers.Dense(2, activation=squared)), "the function 'squared' was not reg"),
    "a Lambda": (lambda path: saved(path, layers.Lambda(lambda x: x * 2, name="double")), "layer 'double' is a Lambda"),
    "a config that is not whole": (incomplete_config, "missing 1 required positional argument: 'by'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_cannot_be_loaded_is_reported_for_what_it_is(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, told = CASES[case]
    make(tmp_path / "mine.keras")
    capsys.readouterr()
    assert main([str(tmp_path / "mine.keras"), "--name", "mine", "--models", str(tmp_path)]) == 1
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1
    assert ("--import" in line) == ("class" in case or "function" in case)


def test_a_file_of_another_name_is_asked_for_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text("import keras")
    assert main([str(tmp_path / "net.py"), "--name", "mine", "--models", str(tmp_path)]) == 1
    assert "its name does not end in .keras" in capsys.readouterr().err
