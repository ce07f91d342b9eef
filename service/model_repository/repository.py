"""The model repository: finds the versions of models in a folder, checks their files, opens them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cellserve.models.signature import (
    MANIFEST_NAME,
    MODEL_NAME,
    STEP_NAME,
    Exactness,
    ModelDocument,
    checked_name,
    rollout_misfit,
)
from cellserve.service.errors import CannotBeStepped
from cellserve.service.runtime.batch_invariance import SHORT, prove
from cellserve.service.runtime.onnx_file import BadModelFile, check
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions, RuntimeUnavailable, parse_document
from cellserve.service.runtime.tensor_layout import Layout
from cellserve.service.validation.json_input import TensorDecoder

log = logging.getLogger("cellserve")

_NUMBER = r"[1-9][0-9]{0,8}"
_MANIFEST_BYTES, _LARGEST_PROTOCOL_BUFFER = 1024 * 1024, 2**31 - 1
_FILES = (MANIFEST_NAME, MODEL_NAME, STEP_NAME)

Stamp = tuple[tuple[int, int, int] | None, ...]  # of each file that matters: when it was changed, its size, its inode


class BrokenModel(Exception):
    """A version in the repository that cannot be served; the message says why."""


class VersionKey(NamedTuple):
    """Names a version of a model; written `NAME:VERSION`."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"

    @classmethod
    def parse(cls, text: str) -> VersionKey | None:
        """Reads `NAME:VERSION`; gives None where it is something else."""
        name, _, number = text.rpartition(":")
        return cls(name, int(number)) if name and re.fullmatch(_NUMBER, number) else None


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
        self.reader = TensorDecoder(runtime.signature)
        self.inputs, self.outputs = Layout(runtime.signature.inputs), Layout(runtime.signature.outputs)
        # Kernels differ between processors: what was proved where it was exported is proved again where it runs.
        self.exactness: Exactness = (
            prove([runtime], SHORT.up_to(max_batch)) if self.document.exactness.proved else self.document.exactness
        )

    @property
    def key(self) -> VersionKey:
        """Its name and version."""
        return VersionKey(self.name, self.version)

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

    def described(self) -> dict[str, Any]:
        """Gives all that is known of it, as JSON has it."""
        return {
            "name": self.name,
            "version": self.version,
            **self.document.model_dump(mode="json", exclude={"format", "name", "exactness"}),
            "digest": self.digest,
            "exact": self.exactness.proved,
            "exactness": self.exactness.why,
            "provider": self.runtime.provider,
        }


@dataclass(frozen=True, slots=True)
class Version:
    """One version in the folder, as it was when its files were looked at."""

    key: VersionKey
    path: Path
    stamp: Stamp
    digest: str = ""  # of the model file, as the manifest gives it
    refused: str = ""  # why it cannot be served; empty as far as nothing is known against it


class Repository:
    """The versions of models in a folder. What it does reads files and may take long: not for the event loop.

    Args:
        folder: Holds NAME/VERSION/model.onnx and NAME/VERSION/manifest.json.
        options: How to run them.
        max_batch: Rows of their largest runs.
        max_bytes: Size of a model file, at most.
    """

    def __init__(self, folder: Path, options: RuntimeOptions, max_batch: int, max_bytes: int) -> None:
        self.folder, self._options, self._max_batch, self._max_bytes = folder, options, max_batch, max_bytes
        self.versions: dict[VersionKey, Version] = {}  # never changed, only replaced, so that any thread may read it
        self._open: dict[VersionKey, str] = {}  # digests of what is open
        self._told: dict[VersionKey, str] = {}  # what the log has been told of versions

    def scan(self, again: bool = False) -> None:
        """Looks the folder over; at files that are as they were only where it is to look `again`.

        Raises:
            BrokenModel: The folder cannot be read, or holds no version of any model; then all stays as it was.
        """
        versions: dict[VersionKey, Version] = {}
        try:
            for key, path in _found(self.folder):
                known, stamp = self.versions.get(key), _stamp(path)
                if known is None or known.stamp != stamp or (again and known.refused):
                    known = self._looked_at(Version(key, path, stamp))
                versions[key] = known
        except OSError as error:
            raise BrokenModel(f"{error.filename or self.folder} cannot be read: {error.strerror}") from None
        if not versions:
            raise BrokenModel(
                f"there is no model to serve in {self.folder}/ (NAME/VERSION/{MODEL_NAME}): "
                f"make one with `cellserve export NETWORK.keras --name NAME`, or give another folder with --models"
            )
        self._told = {key: told for key, told in self._told.items() if key in versions}
        self.versions = versions

    def by_name(self) -> dict[str, list[Version]]:
        """Gives each name with its versions, the newest (that with the highest number) first."""
        names: dict[str, list[Version]] = {}
        for key in sorted(self.versions, key=lambda key: (key.name, -key.version)):
            names.setdefault(key.name, []).append(self.versions[key])
        return names

    def open(self, key: VersionKey) -> Model:
        """Opens a version that is in the folder.

        Raises:
            BrokenModel: It cannot be served, and will be `refused` until its files change.
            RuntimeUnavailable: The provider that was asked for is not to be had.
        """
        version = self.versions.get(key)
        if version is None or version.refused:
            raise BrokenModel(version.refused if version else "it is not in the folder any more")
        try:
            model = load(key.name, version.path, self._options, self._max_batch, self._max_bytes)
        except BrokenModel as broken:
            self.refuse(key, str(broken))
            raise
        self._told.pop(key, None)
        self._open[key] = model.digest
        self.versions = {**self.versions, key: replace(version, digest=model.digest)}
        return model

    def refuse(self, key: VersionKey, reason: str) -> None:
        """Notes that a version cannot be served."""
        self._open.pop(key, None)
        self.versions = {**self.versions, key: self._refused(self.versions[key], reason)}

    def closed(self, key: VersionKey) -> None:
        """Notes that a version is open no more: other files may stand in its place."""
        self._open.pop(key, None)
        known = self.versions.get(key)
        if known is not None and known.refused:
            self.versions = {other: version for other, version in self.versions.items() if other != key}

    def _looked_at(self, version: Version) -> Version:
        """Reads the manifest of a version whose files are new, or, where it is open, all that has changed."""
        opened = self._open.get(version.key)
        try:
            digest = _digests(version.path)[MODEL_NAME]
            if opened is not None and (opened != digest or _files(version.path, self._max_bytes)[0] != opened):
                raise BrokenModel("other files than those")
        except BrokenModel as broken:
            if opened is None:
                return self._refused(version, str(broken))
            return self._refused(
                version,
                "its files were changed while it is loaded, and a version never changes: what was loaded stays loaded; "
                "put the files back, and give others the next number",
            )
        return replace(version, digest=digest)

    def _refused(self, version: Version, reason: str) -> Version:
        if self._told.get(version.key) != reason:  # once, not each time that it is looked at
            self._told[version.key] = reason
            goes_on = version.key in self._open
            log.error("%s %s: %s", version.path, "goes on as it was loaded" if goes_on else "is refused", reason)
        return replace(version, refused=reason)


def load(
    name: str, path: Path, options: RuntimeOptions, max_batch: int, max_bytes: int = _LARGEST_PROTOCOL_BUFFER
) -> Model:
    """Checks the files of one version and opens it.

    Raises:
        BrokenModel: A file is missing, is not the one that was exported or cannot be served.
    """
    digest, files = _files(path, max_bytes)
    try:
        for file, content in files.items():
            try:
                looked_into = check(content)
                if file == MODEL_NAME:
                    _check_rollout(parse_document(looked_into.metadata))
            except (BadModelFile, RuntimeUnavailable) as bad:
                raise BrokenModel(f"{file}: {bad}") from None
        runtime = Runtime(files[MODEL_NAME], options, files.get(STEP_NAME))
    except RuntimeUnavailable as error:
        if options.provider == "cuda":
            raise
        raise BrokenModel(str(error)) from None
    try:
        model = Model(name, int(path.name), digest, runtime, max_batch)
    except Exception as error:
        raise BrokenModel(cannot_be_run(error)) from None
    log.info("%s version %s on %s, exact: %s", name, path.name, runtime.provider, model.exactness.proved)
    return model


def _check_rollout(document: ModelDocument) -> None:
    misfit = None if document.rollout is None else rollout_misfit(document.signature, document.rollout)
    if misfit is not None:
        raise BrokenModel(f"{MODEL_NAME}: it says rollout {document.rollout!r}, but {misfit}")


def cannot_be_run(error: Exception) -> str:
    """Says in one line what came of trying to run a model."""
    return f"it cannot be run: {(str(error).splitlines() or [type(error).__name__])[0]}"


def _files(path: Path, max_bytes: int) -> tuple[str, dict[str, bytes]]:
    """Reads the files of one version and compares them with its manifest; gives the model's digest and the files."""
    digests, files = _digests(path), {}
    for file in digests.keys() & {MODEL_NAME, STEP_NAME}:
        files[file] = _read(path / file, max_bytes)
        if hashlib.sha256(files[file]).hexdigest() != digests[file]:
            raise BrokenModel(
                f"{file} is not the file that its {MANIFEST_NAME} describes: it was changed or damaged, or has not "
                f"been copied whole yet"
            )
    return digests[MODEL_NAME], files


def _digests(path: Path) -> dict[str, str]:
    """Reads a manifest: the SHA-256 of each file."""
    try:
        digests: dict[str, str] = json.loads(_read(path / MANIFEST_NAME, _MANIFEST_BYTES))["files"]
        if not all(isinstance(digest, str) for digest in digests.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BrokenModel(f'{MANIFEST_NAME} is not {{"files": {{NAME: SHA-256}}}}') from None
    if MODEL_NAME not in digests:
        raise BrokenModel(f"its {MANIFEST_NAME} does not list {MODEL_NAME}")
    return digests


def _read(path: Path, most: int) -> bytes:
    try:
        told = path.stat()
        if not stat.S_ISREG(told.st_mode):
            raise BrokenModel(f"{path.name} is not a file")  # a pipe would be read for ever
        if told.st_size > most:
            raise BrokenModel(f"{path.name} has {told.st_size} bytes, {most} may be: see --max-model-bytes")
        return path.read_bytes()
    except OSError as error:
        raise BrokenModel(f"{path.name}: {error.strerror}: it is missing, or has not been copied yet") from None


def _stamp(path: Path) -> Stamp:
    return tuple(_file_stamp(path / file) for file in _FILES)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        told = path.stat()
    except OSError:
        return None
    return told.st_mtime_ns, told.st_size, told.st_ino


def _found(folder: Path) -> Iterator[tuple[VersionKey, Path]]:
    """Gives the folders of versions; what is named otherwise (drafts, notes) is nobody's business here."""
    if not folder.is_dir():
        return
    for home in folder.iterdir():
        try:
            checked_name(home.name)
            numbers = [entry.name for entry in os.scandir(home) if re.fullmatch(_NUMBER, entry.name) and entry.is_dir()]
        except (ValueError, NotADirectoryError, FileNotFoundError):
            continue
        for number in numbers:
            yield VersionKey(home.name, int(number)), home / number
