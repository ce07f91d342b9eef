"""The model repository: finds the models in a folder, checks their files, opens them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from models.signature import MANIFEST_NAME, MODEL_NAME, STEP_NAME, Exactness, ModelDocument
from service.errors import CannotBeStepped, UnknownModel
from service.exactness import SHORT, prove
from service.layout import Layout
from service.runtime import Runtime, RuntimeOptions, RuntimeUnavailable
from service.tensors import TensorReader

log = logging.getLogger("cellserve")


class BrokenModel(Exception):
    """A version in the repository that cannot be served; the message says why."""


class Model:
    """One version of a model, open and ready.

    Args:
        name: The name of its folder.
        version: The number of its folder.
        digest: SHA-256 of its model file: what sessions are bound to.
        runtime: Runs it.
        max_batch: Rows of its largest run.
    """

    def __init__(self, name: str, version: int, digest: str, runtime: Runtime, max_batch: int) -> None:
        self.name, self.version, self.digest, self.runtime = name, version, digest, runtime
        self.reader = TensorReader(runtime.signature)
        self.inputs, self.outputs = Layout(runtime.signature.inputs), Layout(runtime.signature.outputs)
        # Kernels differ between processors: what was proved where it was exported is proved again where it runs.
        self.exactness: Exactness = (
            prove([runtime], SHORT.up_to(max_batch)) if self.document.exactness.proved else self.document.exactness
        )

    def check_steppable(self) -> None:
        """Raises CannotBeStepped where the model takes whole sequences only."""
        why = self.runtime.signature.predict_only
        if why is not None:
            raise CannotBeStepped(
                f"model {self.name!r} cannot be stepped, so that there are no sessions of it: {why}: "
                f"send whole sequences to POST /predict"
            )

    @property
    def document(self) -> ModelDocument:
        """What the model file says about itself."""
        return self.runtime.document


class Repository:
    """The models that are served: of each name in the folder the highest version that can be opened.

    Args:
        folder: Holds NAME/VERSION/model.onnx and NAME/VERSION/manifest.json.
        options: How to run them.
        max_batch: Rows of their largest runs.

    Raises:
        RuntimeUnavailable: The provider that was asked for is not to be had.
        BrokenModel: The folder holds no model that can be served.
    """

    def __init__(self, folder: Path, options: RuntimeOptions, max_batch: int) -> None:
        self.models: dict[str, Model] = {}
        for name, versions in sorted(_found(folder)):
            for path in versions:
                try:
                    self.models[name] = load(name, path, options, max_batch)
                    break
                except BrokenModel as broken:
                    log.error("%s is not served: %s", path, broken)
        if not self.models:
            raise BrokenModel(
                f"there is no model to serve in {folder}/ (NAME/VERSION/{MODEL_NAME}): "
                f"make one with `cellserve export NETWORK.keras --name NAME`, or give another folder with --models"
            )

    def get(self, name: str | None) -> Model:
        """Gives a model by its name; without a name, the one that is served where it is the only one.

        Raises:
            UnknownModel: There is none of that name, or no name and several models.
        """
        if name is None:
            if len(self.models) == 1:
                return next(iter(self.models.values()))
            raise UnknownModel(f"model: missing, and several are served: send one of {', '.join(self.models)}")
        model = self.models.get(name)
        if model is None:
            raise UnknownModel(f"model: there is none named {name[:80]!r}: send one of {', '.join(self.models)}")
        return model


def load(name: str, path: Path, options: RuntimeOptions, max_batch: int) -> Model:
    """Checks the files of one version against its manifest and opens it.

    Raises:
        BrokenModel: A file is missing or is not the one that was exported, or ONNX Runtime cannot open it.
    """
    try:
        digests = json.loads((path / MANIFEST_NAME).read_text())["files"]
        files = {file: (path / file).read_bytes() for file in digests if file in (MODEL_NAME, STEP_NAME)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenModel(f"{type(error).__name__}: {error}") from None
    if MODEL_NAME not in files:
        raise BrokenModel(f"its {MANIFEST_NAME} does not list {MODEL_NAME}")
    for file, content in files.items():
        if hashlib.sha256(content).hexdigest() != digests[file]:
            raise BrokenModel(f"{file} is not the file that its {MANIFEST_NAME} describes: it was changed or damaged")
    try:
        runtime = Runtime(files[MODEL_NAME], options, files.get(STEP_NAME))
    except RuntimeUnavailable as error:
        if options.provider == "cuda":
            raise
        raise BrokenModel(str(error)) from None
    try:
        model = Model(name, int(path.name), digests[MODEL_NAME], runtime, max_batch)
    except Exception as error:
        raise BrokenModel(f"it cannot be run: {str(error).strip().splitlines()[0]}") from None
    log.info("%s version %s on %s, exact: %s", name, path.name, runtime.provider, model.exactness.proved)
    return model


def _found(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Gives each name in the folder with the folders of its versions, the highest first."""
    if folder.is_dir():
        for home in folder.iterdir():
            if home.is_dir() and not home.name.startswith("."):
                versions = [path for path in home.iterdir() if path.name.isdigit() and path.is_dir()]
                if versions:
                    yield home.name, sorted(versions, key=lambda path: int(path.name), reverse=True)
