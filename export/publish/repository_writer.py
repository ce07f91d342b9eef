"""Writes a version of a model into the repository, `artifacts/NAME/VERSION/`: all its files at once or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from cellserve.export.errors import ExportError
from cellserve.models.signature import MANIFEST_NAME


def check_writable(models: Path, name: str, version: int | None) -> None:
    """Checks, before the long work, that a version of a model can be written; leaves nothing behind.

    Raises:
        ExportError: It cannot be written, or the version exists.
    """
    home = models / name
    made: list[Path] = []  # innermost first
    try:
        if version and (home / str(version)).exists():
            raise _there_already(home / str(version))
        made = [folder for folder in (home, *home.parents) if not folder.exists()]
        home.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".draft-", dir=home)).rmdir()
    except OSError as error:
        raise _not_writable(home, error) from None
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # it was not created, or another export writes there now
                break


def _there_already(target: Path) -> ExportError:
    return ExportError(f"{target} already exists: give another --version, or none for the next one")


def _not_writable(home: Path, error: OSError) -> ExportError:
    return ExportError(f"{home}/ is not writable ({error.strerror}): give a writable folder with --models")


def write(models: Path, name: str, version: int | None, files: dict[str, bytes]) -> Path:
    """Writes one version of a model.

    Args:
        models: The repository's folder, created if it is missing.
        name: The model's name.
        version: A positive number, or None for the next free one.
        files: File names and contents.

    Returns:
        The folder of the version.

    Raises:
        ExportError: The version exists (versions never change, as sessions are bound to them), or the folder is not
            writable.
    """
    home = models / name
    try:
        return _write(home, version, files)
    except OSError as error:
        raise _not_writable(home, error) from None


def _write(home: Path, version: int | None, files: dict[str, bytes]) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
    try:
        draft.chmod(0o755)
        for file_name, content in files.items():
            (draft / file_name).write_bytes(content)
        manifest = {"files": {file_name: hashlib.sha256(content).hexdigest() for file_name, content in files.items()}}
        (draft / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        while True:
            target = home / str(version or next_version(home))
            try:
                os.rename(draft, target)
                return target
            except OSError:
                if not target.exists():
                    raise
                if version:
                    raise _there_already(target) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def next_version(home: Path) -> int:
    """The number after the highest version in a model's folder."""
    return max((int(path.name) for path in home.iterdir() if path.name.isdigit()), default=0) + 1
