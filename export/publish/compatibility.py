"""What a next version of a model means for the clients of the newest one that is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cellserve.models.signature import MODEL_NAME, Signature, StateSpec, TensorSpec
from cellserve.service.runtime.onnx_file import BadModelFile, scan
from cellserve.service.runtime.onnx_model import RuntimeUnavailable, parse_document


def warning(artifacts: Path, name: str, signature: Signature) -> str:
    """Says what of a signature differs from the newest version in the repository; empty where nothing does."""
    newest = _newest(artifacts / name)
    if newest is None:
        return ""
    version, before = newest
    ends: tuple[tuple[str, Sequence[TensorSpec | StateSpec], Sequence[TensorSpec | StateSpec]], ...] = (
        ("takes", before.inputs, signature.inputs),
        ("gives", before.outputs, signature.outputs),
        ("carries", before.states, signature.states),
    )
    told = [
        f"{verb} {_specs(after)} (version {version}: {_specs(earlier)})"
        for verb, earlier, after in ends
        if _specs(earlier) != _specs(after)
    ]
    if not told:
        return ""
    return f"it {'; '.join(told)}: clients of {name} must change; give it another --name if that is not meant"


def _newest(home: Path) -> tuple[int, Signature] | None:
    """Gives the newest version that can be read, and its signature."""
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
