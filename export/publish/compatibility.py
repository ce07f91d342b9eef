"""Whether the next version of a model is compatible with the clients of the newest one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cellserve.models.signature import MODEL_NAME, Signature, StateSpec, TensorSpec
from cellserve.service.runtime.onnx_file import BadModelFile, scan
from cellserve.service.runtime.onnx_model import parse_document
from cellserve.service.runtime.providers import RuntimeUnavailable


def warning(models: Path, name: str, signature: Signature) -> str:
    """Describes how a signature differs from the newest version in the repository; empty if it does not."""
    newest = _newest(models / name)
    if newest is None:
        return ""
    version, before = newest
    compared: tuple[tuple[str, Sequence[TensorSpec | StateSpec], Sequence[TensorSpec | StateSpec]], ...] = (
        ("takes", before.inputs, signature.inputs),
        ("gives", before.outputs, signature.outputs),
        ("carries", before.states, signature.states),
    )
    changes = [
        f"{verb} {_specs(after)} (version {version}: {_specs(earlier)})"
        for verb, earlier, after in compared
        if _specs(earlier) != _specs(after)
    ]
    if not changes:
        return ""
    return f"it {'; '.join(changes)}: clients of {name} must change; if that is not intended, give it another --name"


def _newest(home: Path) -> tuple[int, Signature] | None:
    """The newest readable version, and its signature."""
    numbers = [int(path.parent.name) for path in home.glob(f"*/{MODEL_NAME}") if path.parent.name.isdigit()]
    for number in sorted(numbers, reverse=True):
        try:
            metadata = scan((home / str(number) / MODEL_NAME).read_bytes()).metadata
            return number, parse_document(metadata).signature
        except (OSError, BadModelFile, RuntimeUnavailable):
            continue
    return None


def _specs(specs: Sequence[TensorSpec | StateSpec]) -> str:
    return ", ".join(f"{spec.name} {list(spec.shape)} {spec.dtype}" for spec in specs) or "none"
