"""The ways in which an export ends without a model, each with what to do about it."""

from __future__ import annotations

import re


class ExportError(Exception):
    """A network that cannot be exported; the message names the layer, says why, and what to do instead."""


class ProofFailed(ExportError):
    """The converted model does not do what Keras does; nothing is written."""


class Unsteppable(ExportError):
    """A network that reads whole sequences only; the message names the layer and says why."""


def first_line(error: Exception) -> str:
    """Gives the first line of what an error says, without Keras's colours and heading and TensorFlow's nodes."""
    lines = re.sub(r"\x1b\[\d*m|\{\{.*?\}\} ?| ?\[Op:.*?\]", "", str(error)).splitlines()
    told = [
        line.strip() for line in lines if line.strip() and not line.startswith("Exception encountered when calling")
    ]
    return told[0].split(". ")[0].rstrip(".:") if told else type(error).__name__
