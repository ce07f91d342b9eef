"""Arguments that `cellserve export` and `cellserve adopt` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from cellserve.models.signature import checked_labels, checked_name


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of both commands: where the model goes, and its description."""
    add = parser.add_argument
    add("--name", required=True, type=_name, help="the model's name in requests and in the repository")
    add("--artifacts", type=Path, default=Path("artifacts"), help="the repository (default: artifacts)")
    add("--version", type=positive, help="a positive number (default: the next free one)")
    add("--labels", type=_labels, help="names of the output's entries, separated by commas")
    add("--rollout", choices=("probabilities", "logits", "value"),
        help="how an output becomes the next input in a rollout")  # fmt: skip


def positive(text: str) -> int:
    """Parses a positive number."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _name(text: str) -> str:
    try:
        return checked_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _labels(text: str) -> tuple[str, ...]:
    try:
        return checked_labels(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
