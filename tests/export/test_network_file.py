"""What cannot be a network is said for what it is, before TensorFlow is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from cellserve.export.cli.export import main
from cellserve.export.errors import ExportError
from cellserve.export.keras_model.network_file import check_network_file


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")


def hdf5(path: Path, **attributes: str) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)


def folder(path: Path, *names: str) -> None:
    path.mkdir()
    for name in names:
        (path / name).touch()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "saved": (lambda path: folder(path, "saved_model.pb"), "a TensorFlow SavedModel, which holds graphs"),
    "unzipped.keras": (lambda path: folder(path, "config.json"), "saved as a folder (zipped=False)"),
    "runs": (lambda path: folder(path, "best.keras"), "it is a folder: give a file in it, such as"),
    "nothing": (folder, "it is a folder: give a file, save the network with"),
    "empty.keras": (Path.touch, "it is empty"),
    "mine.weights.h5": (hdf5, "weights without layers (save_weights)"),
    "mine.h5": (hdf5, "weights without layers (save_weights)"),
    "mine.hdf": (lambda path: hdf5(path, model_config="{}"), "give it a name that ends in .h5"),
    "text.h5": (lambda path: path.write_text("weights"), "it is not an HDF5 file, or an incomplete one"),
    "saved_model.pb": (lambda path: path.write_text("graph"), "a graph of TensorFlow"),
    "mine.onnx": (lambda path: path.write_text("graph"), "an ONNX model: `cellserve adopt`"),
    "mine.pt": (lambda path: path.write_text("weights"), "of PyTorch export ONNX"),
    "mine.tflite": (lambda path: path.write_text("graph"), "TensorFlow Lite"),
    "mine.py": (lambda path: path.write_text("import keras"), "its name does not end in .keras"),
    "mine.keras": (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "an incomplete one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_network_is_said_for_what_it_is(name: str, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(ExportError, match="cannot be loaded: ") as refused:
        check_network_file(tmp_path / name)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_may_hold_a_network_is_left_for_keras_to_load(tmp_path: Path) -> None:
    archive(tmp_path / "mine.keras")
    hdf5(tmp_path / "mine.h5", model_config="{}")
    check_network_file(tmp_path / "mine.keras")
    check_network_file(tmp_path / "mine.h5")


def test_a_missing_file_and_one_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "vowels.keras")
    with pytest.raises(ExportError, match=r"no such file \(did you mean .*vowels.keras\?\)"):
        check_network_file(tmp_path / "vowel.keras")
    with pytest.raises(ExportError, match="no such file: save"):
        check_network_file(tmp_path / "no folder" / "vowel.keras")

    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ExportError, match=r"cannot be read \(Permission denied\)"):
        check_network_file(tmp_path / "vowels.keras")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_other_files_and_flags_are_checked_before_the_work_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "mine.keras")
    (tmp_path / "cells.py").touch()
    (tmp_path / "text.npz").write_text("no archive")
    given = ["mine.keras", "--name", "mine"]
    assert "--import cell.py: no such file (did you mean cells.py?)" in refused([*given, "--import", "cell.py"], capsys)
    assert "--import mine.keras: not a Python file" in refused([*given, "--import", "mine.keras"], capsys)
    assert "--data x.npz: no such file" in refused([*given, "--data", "x.npz"], capsys)
    assert "--data .: it is a folder" in refused([*given, "--data", "."], capsys)
    assert "text.npz: not test data" in refused([*given, "--data", "text.npz"], capsys)
    assert "int8 needs test data" in refused([*given, "--quantize", "int8"], capsys)
    for card, said in (
        ("{", "invalid JSON"), ("[]", "a JSON object"), ('{"rollout": "x"}', "rollout is 'x'"),
        ('{"task": "x"}', "task is 'x': one of forecast, classify, text, audio"),
    ):  # fmt: skip
        (tmp_path / "mine.card.json").write_text(card)
        assert said in refused(given, capsys)
    (tmp_path / "mine.card.json").write_text(json.dumps({"rollout": None}))
    assert "int8 needs test data" in refused([*given, "--quantize", "int8"], capsys)


def test_mistakes_are_reported_without_importing_tensorflow(tmp_path: Path) -> None:
    code = (
        "import sys; from cellserve.export.cli.export import main; status = main(['missing.keras', '--name', 'x']); "
        "assert not {'tensorflow', 'keras', 'onnx'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "missing.keras: no such file" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x.keras", "--name", "x", "--quantise", "int8"], "no flag --quantise (did you mean --quantize?)"),
        (["x.keras", "--nmae=x"], "no flag --nmae (did you mean --name?)"),
        (["x.keras", "-name", "x"], "no flag -name (did you mean --name?)"),
        (["x.keras", "--zzz"], "no flag --zzz\n"),
    ],
)
def test_an_unknown_flag_is_reported_with_the_one_that_was_meant(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
