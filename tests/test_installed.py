"""The wheel in an environment of its own, used from a folder whose files are named like parts of this repository."""

from __future__ import annotations

import os
import re
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT

# What a user's own files may well be called.
OWN = ("models", "service", "export", "cells", "client")
NETWORK = """
import keras
from cellserve.models.cells import LSTMCell
from models import mine
layers = [keras.Input((None, 2)), keras.layers.RNN(LSTMCell(3), return_sequences=True), keras.layers.Dense(1)]
keras.Sequential(layers).save(f"{mine}.keras")
"""
CLIENT = """
import sys
import numpy as np
from cellserve import Client
import service, export
with Client(sys.argv[1]) as client:
    session = client.session("mine")
    print(session.step(np.zeros((4, 2))).shape)
    print(client.predict("mine", np.zeros((4, 2))).y.shape)
"""


def build(folder: Path, what: str) -> Path:
    """Builds the wheel or the sdist from the repository's files, as `pip install .` does, and leaves none here."""
    source = folder / "source"
    if not source.exists():
        ignored = shutil.ignore_patterns(".*", "__pycache__", "artifacts", "trained", "*.egg-info", "build")
        shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(once: Callable[[str, Callable[[Path], Path]], Path]) -> Path:
    return once("wheel", lambda folder: build(folder, "wheel"))


@pytest.fixture(scope="module")
def installed(once: Callable[[str, Callable[[Path], Path]], Path], wheel: Path) -> Path:
    """An environment with the wheel, and of this one what the wheel needs."""

    def make(folder: Path) -> Path:
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        python = folder / "venv/bin/python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True)
        # A path in a .pth file is searched, the .pth files there (this repository's own) are not read.
        (packages,) = (folder / "venv").glob("lib/python*/site-packages")
        (packages / "needs.pth").write_text("\n".join(site.getsitepackages()))
        return folder / "venv"

    return once("installed", make)


def test_a_wheel_has_one_name_at_its_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"cellserve", "cellserve-0.1.0.dist-info"}
    files = ("service/app.py", "service/ui/index.html", "export/report/report.html", "models/cells.py", "py.typed")
    for part in files:
        assert f"cellserve/{part}" in names
    assert [name for name in names if name.startswith("cellserve/models/data/")]


def test_an_sdist_holds_all_that_the_wheel_does(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(tmp_path, "sdist")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cellserve/")} <= names


@pytest.mark.long
def test_everything_works_beside_files_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    for name in OWN:
        (tmp_path / f"{name}.py").write_text("mine = 'mine'\n")
    (tmp_path / "make.py").write_text(NETWORK)
    (tmp_path / "ask.py").write_text(CLIENT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(installed / "bin" / command[0]), *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("python", "-c", "import cellserve; print(cellserve.__file__)").startswith(str(installed))
    run("python", "make.py")
    run("cellserve", "export", "mine.keras", "--name", "mine", "--import", "models.py")
    assert "mine" in run("cellserve", "models")
    command = [str(installed / "bin/cellserve"), "serve", "--port", "0", "--models", "artifacts"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            url = next(found[1] for line in server.stderr if (found := re.search(r"running on (http://\S+)", line)))
            assert run("python", "ask.py", url).split("\n")[:2] == ["(4, 1)", "(4, 1)"]
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)
    assert server.returncode == 0
