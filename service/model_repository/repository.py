"""The model repository: finds model versions in a folder, checks their files, and opens them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cellserve.models.signature import (
    MANIFEST_NAME,
    MODEL_NAME,
    STEP_NAME,
    ModelDocument,
    checked_name,
    labels_misfit,
    rollout_misfit,
)
from cellserve.service.errors import printable
from cellserve.service.model_repository.errors import BrokenModel
from cellserve.service.model_repository.model import VERSION_NUMBER, Model, VersionKey
from cellserve.service.model_repository.trial import Trial
from cellserve.service.runtime.onnx_file import BadModelFile, validate
from cellserve.service.runtime.onnx_model import Runtime, RuntimeOptions, parse_document
from cellserve.service.runtime.provider_parity import NotWithinTolerance, check_parity
from cellserve.service.runtime.providers import CPU, RuntimeUnavailable

log = logging.getLogger("cellserve")

_MANIFEST_BYTES, _LARGEST_PROTOCOL_BUFFER = 1024 * 1024, 2**31 - 1
_FILES = (MANIFEST_NAME, MODEL_NAME, STEP_NAME)

Digests = Mapping[str, str]  # SHA-256 of each model file of a version, by the file's name
# For each relevant file: modification time, size and inode; None if it is missing.
Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Version:
    """One version in the folder, as its files were when they were last inspected."""

    key: VersionKey
    path: Path
    stamp: Stamp
    digests: Digests = field(default_factory=dict)  # from the manifest; empty if it cannot be read
    refused: str = ""  # reason it cannot be served; empty if none is known

    @property
    def digest(self) -> str:
        """SHA-256 of the model file; empty if it is not known."""
        return self.digests.get(MODEL_NAME, "")


class Repository:
    """The model versions in a folder. Its methods read files and may block: not for use in the event loop.

    Args:
        folder: Holds NAME/VERSION/model.onnx and NAME/VERSION/manifest.json.
        options: How to run the models.
        max_batch: Rows of their largest runs.
        max_bytes: Size of a model file, at most.
    """

    def __init__(self, folder: Path, options: RuntimeOptions, max_batch: int, max_bytes: int) -> None:
        self.folder, self._options, self._max_batch, self._max_bytes = folder, options, max_batch, max_bytes
        self.versions: dict[VersionKey, Version] = {}  # replaced, never mutated: any thread may read it
        self.trial = Trial()
        self._open: dict[VersionKey, Digests] = {}  # the open versions
        self._opened: set[str] = set()  # digests of all files that were ever open here
        self._last_logged: dict[VersionKey, str] = {}  # the last reason logged for each version

    def scan(self, again: bool = False) -> None:
        """Rescans the folder, inspecting files that are new or changed.

        Args:
            again: Also inspect refused versions whose files have not changed.

        Raises:
            BrokenModel: The folder cannot be read, or holds no model version; then nothing changes.
        """
        versions: dict[VersionKey, Version] = {}
        try:
            for key, path in _list_versions(self.folder):
                known, stamp = self.versions.get(key), _stamp(path)
                if known is None or known.stamp != stamp or (again and known.refused):
                    known = self._inspect(Version(key, path, stamp))
                versions[key] = known
        except OSError as error:
            raise BrokenModel(f"{error.filename or self.folder} cannot be read: {error.strerror}") from None
        if not versions:
            raise BrokenModel(
                f"there is no model to serve in {self.folder}/ (NAME/VERSION/{MODEL_NAME}): "
                f"create one with `cellserve export NETWORK.keras --name NAME`, or give another folder with --models"
            )
        self._last_logged = {key: reason for key, reason in self._last_logged.items() if key in versions}
        self.versions = versions

    def by_name(self) -> dict[str, list[Version]]:
        """Returns the versions of each name, newest (highest number) first."""
        names: dict[str, list[Version]] = {}
        for key in sorted(self.versions, key=lambda key: (key.name, -key.version)):
            names.setdefault(key.name, []).append(self.versions[key])
        return names

    def open(self, key: VersionKey, started: bool = False) -> Model:
        """Opens a version that is in the folder.

        A process of its own opens it first, unless files with its digests were open here before: what crashes ONNX
        Runtime is refused, and does not end the server. Both open the files that the manifest described at the last
        scan: files that are replaced meanwhile are refused.

        Args:
            key: The version.
            started: Whether others are served already.

        Raises:
            BrokenModel: It cannot be served; it stays `refused` until its files change.
            RuntimeUnavailable: The requested provider is not available.
        """
        version = self.versions.get(key)
        if version is None or version.refused:
            raise BrokenModel(version.refused if version else "it is not in the folder any more")
        try:
            self._check_links(version.path)
            which = version.path, self._options, self._max_batch, self._max_bytes, version.digests
            if not self._opened.issuperset(version.digests.values()):
                if started:
                    self.trial.open(key.name, *which)
                else:
                    self.trial.open_at_start(version.path, self._options, self._max_bytes, version.digests)
            model = load(key.name, *which)
        except BrokenModel as broken:
            self.refuse(key, str(broken))
            raise
        self._last_logged.pop(key, None)
        self._open[key] = version.digests
        self._opened.update(version.digests.values())
        return model

    def refuse(self, key: VersionKey, reason: str) -> None:
        """Records that a version cannot be served."""
        self._open.pop(key, None)
        self.versions = {**self.versions, key: self._mark_refused(self.versions[key], reason)}

    def mark_closed(self, key: VersionKey) -> None:
        """Records that a version was closed: its files may be replaced from now on."""
        self._open.pop(key, None)
        known = self.versions.get(key)
        if known is not None and known.refused:
            self.versions = {other: version for other, version in self.versions.items() if other != key}

    def _inspect(self, version: Version) -> Version:
        """Reads a version's manifest; if the version is open, also verifies that its model file is unchanged."""
        opened = self._open.get(version.key)
        try:
            self._check_links(version.path)
            digests = _read_manifest(version.path)
            if opened is not None:
                read_files(version.path, self._max_bytes, opened)
                if digests != opened:
                    raise BrokenModel("the files differ from the open ones")
        except BrokenModel as broken:
            if opened is None:
                return self._mark_refused(version, str(broken))
            return self._mark_refused(
                version,
                "its files were changed while it is loaded, but a version must never change. The loaded model stays in "
                "use: restore the files, and publish the new ones under the next number",
            )
        return replace(version, digests=digests)

    def _check_links(self, path: Path) -> None:
        """Raises BrokenModel if a version's folder or file is a link that leads out of the repository."""
        root = os.path.realpath(self.folder)
        for file in ("", *_FILES):
            if os.path.commonpath((root, os.path.realpath(path / file))) != root:
                name = file or "its folder"
                raise BrokenModel(f"{name} is a link that leads out of the folder of models: copy the files there")

    def _mark_refused(self, version: Version, reason: str) -> Version:
        reason = printable(reason)  # it may repeat what stands in a file
        if self._last_logged.get(version.key) != reason:  # logged once, not on each scan
            self._last_logged[version.key] = reason
            is_open = version.key in self._open
            log.error("%s %s: %s", version.path, "stays as it was loaded" if is_open else "is refused", reason)
        return replace(version, refused=reason)


def load(
    name: str,
    path: Path,
    options: RuntimeOptions,
    max_batch: int,
    max_bytes: int = _LARGEST_PROTOCOL_BUFFER,
    digests: Digests | None = None,
) -> Model:
    """Checks the files of one version and opens it; `digests` are those of `read_files`.

    Raises:
        BrokenModel: A file is missing, is not the one that was exported, or cannot be served.
    """
    digest, files = read_files(path, max_bytes, digests)
    try:
        for file, content in files.items():
            try:
                scanned = validate(content)
                if file == MODEL_NAME:
                    _check_document(parse_document(scanned.metadata))
            except (BadModelFile, RuntimeUnavailable) as bad:
                raise BrokenModel(f"{file}: {bad}") from None
        runtime = Runtime(files[MODEL_NAME], options, files.get(STEP_NAME))
    except RuntimeUnavailable as error:
        if options.provider == "cuda":
            raise
        raise BrokenModel(str(error)) from None
    try:
        off_cpu = None
        if runtime.provider != CPU:
            on_cpu = Runtime(files[MODEL_NAME], replace(options, provider="cpu"), files.get(STEP_NAME))
            off_cpu = check_parity(runtime, on_cpu)
        model = Model(name, int(path.name), digest, runtime, max_batch, off_cpu)
    except NotWithinTolerance as error:
        raise BrokenModel(str(error)) from None
    except Exception as error:
        raise BrokenModel(run_failure(error)) from None
    exactness = model.exactness
    exact = f"exact in {exactness.shapes}" if exactness.proved else f"not exact ({exactness.why})"
    parity = "" if off_cpu is None else f", {off_cpu:.1e} off the CPU"
    log.info("%s version %s on %s%s, %s", name, path.name, runtime.provider, parity, exact)
    return model


def _check_document(document: ModelDocument) -> None:
    misfit = None if document.labels is None else labels_misfit(document.signature, document.labels)
    if misfit is not None:
        raise BrokenModel(f"{MODEL_NAME}: it has {len(document.labels or ())} labels, but {misfit}")
    misfit = None if document.rollout is None else rollout_misfit(document.signature, document.rollout)
    if misfit is not None:
        raise BrokenModel(f"{MODEL_NAME}: it declares rollout {document.rollout!r}, but {misfit}")


def run_failure(error: Exception) -> str:
    """Describes in one line why running a model failed."""
    return f"it cannot be run: {(str(error).splitlines() or [type(error).__name__])[0]}"


def read_files(path: Path, max_bytes: int, digests: Digests | None = None) -> tuple[str, dict[str, bytes]]:
    """Reads the files of one version and verifies their digests; returns the model's digest and the files.

    Args:
        path: The version's folder.
        max_bytes: Size of a file, at most.
        digests: What its manifest said when it was read before; None reads it now.

    Raises:
        BrokenModel: A file cannot be read, or is another.
    """
    if digests is None:
        digests = _read_manifest(path)
    files = {}
    for file in digests:
        files[file] = _read_file(path / file, max_bytes)
        if hashlib.sha256(files[file]).hexdigest() != digests[file]:
            raise BrokenModel(
                f"{file} does not match its {MANIFEST_NAME}: it was changed or damaged, or is still being copied"
            )
    return digests[MODEL_NAME], files


def _read_manifest(path: Path) -> Digests:
    """Reads the SHA-256 of each model file from the manifest."""
    try:
        digests: Digests = json.loads(_read_file(path / MANIFEST_NAME, _MANIFEST_BYTES))["files"]
        if not all(isinstance(digest, str) for digest in digests.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BrokenModel(f'{MANIFEST_NAME} is not {{"files": {{NAME: SHA-256}}}}') from None
    if MODEL_NAME not in digests:
        raise BrokenModel(f"its {MANIFEST_NAME} does not list {MODEL_NAME}")
    return {file: digests[file] for file in (MODEL_NAME, STEP_NAME) if file in digests}


def _read_file(path: Path, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BrokenModel(f"{path.name} is not a file")  # reading a pipe would block for ever
        if status.st_size > max_bytes:
            raise BrokenModel(
                f"{path.name} has {status.st_size} bytes, more than the limit of {max_bytes}: raise --max-model-bytes"
            )
        return path.read_bytes()
    except OSError as error:
        raise BrokenModel(f"{path.name}: {error.strerror}: it is missing, or is still being copied") from None


def _stamp(path: Path) -> Stamp:
    return tuple(_file_stamp(path / file) for file in _FILES)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _list_versions(folder: Path) -> Iterator[tuple[VersionKey, Path]]:
    """Yields the folders of versions; folders with other names (drafts, notes) are ignored."""
    if not folder.is_dir():
        return
    for home in folder.iterdir():
        try:
            checked_name(home.name)
            entries = [entry for entry in os.scandir(home) if re.fullmatch(VERSION_NUMBER, entry.name)]
        except (ValueError, NotADirectoryError, FileNotFoundError):
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:  # a link to itself
                continue
            raise
        # A link that leads nowhere is a version that is refused: it does not keep the others from being seen.
        numbers = [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]
        for number in numbers:
            yield VersionKey(home.name, int(number)), home / number
