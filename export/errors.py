"""Errors that end an export without a model, each with what to do about it."""

from __future__ import annotations

import re


class ExportError(Exception):
    """A network that cannot be exported; the message names the layer, says why, and what to do instead."""


class ProofFailed(ExportError):
    """The converted model differs from Keras; nothing is written."""


class Unsteppable(ExportError):
    """A network that reads whole sequences only; the message names the layer and says why."""


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
