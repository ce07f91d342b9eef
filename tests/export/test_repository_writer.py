"""The repository as the export writes to it: that it can be written to is known before the long work."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellserve.export.cli import adopt
from cellserve.export.errors import ExportError
from cellserve.export.publish import repository_writer


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    repository_writer.check_writable(tmp_path / "new/artifacts", "mine", None)
    assert not list(tmp_path.iterdir())
    folder = repository_writer.write(tmp_path, "mine", None, {"model.onnx": b"model"})
    before = sorted(tmp_path.rglob("*"))
    repository_writer.check_writable(tmp_path, "mine", None)
    assert folder in before
    assert sorted(tmp_path.rglob("*")) == before


def test_a_version_that_is_there_already_is_refused_before_the_work(tmp_path: Path) -> None:
    repository_writer.write(tmp_path, "mine", 2, {"model.onnx": b"model"})
    with pytest.raises(ExportError, match="already exists: give another --version"):
        repository_writer.check_writable(tmp_path, "mine", 2)


@pytest.mark.parametrize("command", ["export", "adopt"])
@pytest.mark.parametrize("folder", ["/proc/x", "file/artifacts"])
def test_a_folder_that_cannot_be_written_to_is_reported_in_one_line_before_anything_is_read(
    command: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cellserve.export.cli import export as export_cli

    main = {"export": export_cli.main, "adopt": adopt.main}[command]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert main(["missing", "--name", "mine", "--models", folder]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"cellserve {command}: {folder}/mine/ is not writable (")
    assert told.endswith("give a writable folder with --models\n")
    assert told.count("\n") == 1


@pytest.mark.parametrize("command", ["export", "adopt"])
def test_the_repository_is_the_one_that_the_server_serves_where_none_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cellserve.export.cli import export as export_cli

    main = {"export": export_cli.main, "adopt": adopt.main}[command]
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CELLSERVE_MODELS", str(tmp_path / "file"))
    assert main(["missing", "--name", "mine"]) == 1
    assert f"{tmp_path}/file/mine/ is not writable" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_any_more_is_reported_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ExportError, match="is not writable"):
        repository_writer.write(tmp_path / "file", "mine", None, {"model.onnx": b"model"})
