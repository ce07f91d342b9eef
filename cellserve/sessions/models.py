"""The models of a repository, for what a store does not say: names, types and shapes of a session's states."""

from __future__ import annotations

from pathlib import Path

from cellserve.models.signature import MODEL_NAME, StateSpec
from cellserve.service.model_repository.errors import BrokenModel
from cellserve.service.model_repository.repository import Repository, read_files
from cellserve.service.runtime.onnx_file import BadModelFile, validate
from cellserve.service.runtime.onnx_model import RuntimeOptions, parse_document
from cellserve.service.runtime.providers import RuntimeUnavailable
from cellserve.service.sessions.stores.records import SessionRecord
from cellserve.sessions.errors import SessionFailed


class Models:
    """The models in a folder; none is run.

    Args:
        folder: The repository.
        max_bytes: Size of a model file, at most.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._repository: Repository | None = None
        self._known: dict[str, tuple[StateSpec, ...]] = {}

    def states_of(self, record: SessionRecord) -> tuple[StateSpec, ...]:
        """Returns the states of a session's model; raises SessionFailed if the folder does not have it."""
        if record.digest not in self._known:
            self._known[record.digest] = self._read(record)
        return self._known[record.digest]

    def _read(self, record: SessionRecord) -> tuple[StateSpec, ...]:
        missing = (
            f"it is a session of {record.model}:{record.version} (digest {record.digest[:12]}...), which is not in "
            f"{self._folder}/: give the folder of its model with --models"
        )
        try:
            if self._repository is None:
                self._repository = Repository(self._folder, RuntimeOptions(), 1, self._max_bytes)
                self._repository.scan()
            for version in self._repository.versions.values():
                if version.digest == record.digest:
                    _, files = read_files(version.path, self._max_bytes)
                    return parse_document(validate(files[MODEL_NAME]).metadata).signature.states
        except (BrokenModel, BadModelFile, RuntimeUnavailable) as error:
            raise SessionFailed(f"{missing} ({error})") from None
        raise SessionFailed(missing)
