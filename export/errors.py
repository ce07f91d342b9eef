"""Errors that end an export without a model, each with what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_AT = "raised in "


class ExportError(Exception):
    """A network that cannot be exported; the message names the layer, says why, and what to do instead."""


class ProofFailed(ExportError):
    """The converted model differs from Keras; nothing is written."""


class Unsteppable(ExportError):
    """A network that reads whole sequences only; the message names the layer and says why."""


def explain_unforeseen(error: Exception) -> str:
    """Returns an error of a library in one line, with the layer that `note_layer` noted."""
    raised = f"{type(error).__name__}: {first_line(error)}"
    for note in getattr(error, "__notes__", ()):
        if note.startswith(_AT):
            return f"{note.removeprefix(_AT)} cannot be exported, it raises {raised}: use another layer in its place"
    return f"the network cannot be exported: {raised}; please report it with the network"


def note_layer(error: Exception, layer: str) -> None:
    """Notes at an error in which layer it was raised; a layer within another one is noted first."""
    error.add_note(f"{_AT}{layer}")


def first_line(error: Exception) -> str:
    """The first sentence of an error of Keras, TensorFlow or ONNX Runtime, without colours, headings and node names."""
    text = re.sub(r"\x1b\[\d*m|\{\{.*?\}\} ?| ?\[Op:.*?\]", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Exception encountered when calling")]
    if not lines:
        return type(error).__name__
    line = lines[0].removeprefix("[ONNXRuntimeError] : ")
    line = line.partition("Status Message: ")[2] or line
    return line.split(". ")[0].rstrip(".:")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` with the most similar of the known words; empty if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
