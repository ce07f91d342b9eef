"""What is to be exported, and the checks that need no TensorFlow."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cellserve.export.errors import ExportError, did_you_mean
from cellserve.export.keras_model.network_file import check_network_file
from cellserve.export.publish import repository_writer
from cellserve.models.signature import Precision, Rollout, Task

DefaultOutput = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Which network to export, how, and what its model file says about it."""

    network: Path
    name: str
    models: Path = Path("artifacts")
    version: int | None = None
    labels: tuple[str, ...] | None = None  # what is in the network's card too overrides it
    description: str | None = None
    default_output: DefaultOutput | None = None
    rollout: Rollout | None = None
    task: Task | None = None  # None: follows from the outputs
    sample_rate: int | None = None
    data: Path | None = None
    imports: tuple[Path, ...] = ()
    precision: Precision = "float32"
    tolerance: float | None = None  # allowed loss of each test metric; None for the default
    quick: bool = False  # leaves out the times of tf2onnx's conversion and of Keras

    @property
    def test_data(self) -> Path | None:
        """The test data that was given, or else the file beside the network."""
        return self.data or _beside(self.network, ".npz")

    def check(self) -> None:
        """Checks the files that are read and the folder that is written, before the long work.

        Raises:
            ExportError: One of them cannot be used.
        """
        repository_writer.check_writable(self.models, self.name, self.version)
        for path in self.imports:
            _check_file("--import", path)
            if path.suffix != ".py":
                raise ExportError(f"--import {path}: not a Python file: give the .py file that registers your cells")
        check_network_file(self.network)
        self.card()
        if self.data:
            _check_file("--data", self.data)
        if self.test_data and not zipfile.is_zipfile(self.test_data):
            raise ExportError(f"{self.test_data}: not test data: an .npz file, written by numpy.savez, is expected")
        if self.precision != "float32" and not self.test_data:
            raise ExportError(
                f"{self.precision} needs test data, to measure its loss: "
                f"give --data FILE.npz (x [n, time, *features], lengths [n], y)"
            )

    def card(self) -> dict[str, Any]:
        """Reads the network's NAME.card.json: labels, metrics, rollout and more; empty if there is none.

        Raises:
            ExportError: It is not JSON, or has values that no model can have.
        """
        path = _beside(self.network, ".card.json")
        if path is None:
            return {}
        try:
            card = json.loads(path.read_text())
        except ValueError as error:
            raise ExportError(f"{path}: invalid JSON: {error}") from None
        if not isinstance(card, dict):
            raise ExportError(f'{path}: a JSON object is expected, such as {{"labels": ["no", "yes"]}}')
        for key, values in (
            ("rollout", get_args(Rollout)),
            ("default_output", get_args(DefaultOutput)),
            ("task", get_args(Task)),
        ):
            if card.get(key) not in (None, *values):
                raise ExportError(f"{path}: {key} is {card[key]!r}: one of {', '.join(values)} is expected")
        return card


def _beside(network: Path, suffix: str) -> Path | None:
    path = network.with_suffix(suffix)
    return path if path.is_file() else None


def _check_file(flag: str, path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise ExportError(f"{flag} {path}: it is a folder: give a file")
    near = map(str, path.parent.glob(f"*{path.suffix}"))
    raise ExportError(f"{flag} {path}: no such file{did_you_mean(str(path), near)}")
