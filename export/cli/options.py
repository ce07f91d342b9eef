"""Arguments that `cellserve export` and `cellserve adopt` share."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellserve.export.errors import did_you_mean
from cellserve.models.signature import checked_labels, checked_name, default_repository


class Parser(argparse.ArgumentParser):
    """An argument parser that says which flag was meant if there is no such flag."""

    def parse(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Parses arguments, by default those of the process; ends the program if they are invalid."""
        given = sys.argv[1:] if argv is None else list(argv)
        known = [flag for action in self._actions for flag in action.option_strings]
        for argument in itertools.takewhile("--".__ne__, given):
            flag = argument.partition("=")[0]
            if re.match("--?[A-Za-z]", flag) and not any(each.startswith(flag) for each in known):
                self.error(f"there is no flag {flag}{did_you_mean('--' + flag.lstrip('-'), known)}")
        return vars(self.parse_args(given))


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of both commands: where the model goes, and its description."""
    add = parser.add_argument
    add("--name", required=True, type=_name, help="the model's name in requests and in the repository")
    add("--models", type=Path, default=default_repository(),
        help="the model repository (CELLSERVE_MODELS; default: artifacts)")  # fmt: skip
    add("--version", type=positive, help="a positive number (default: the next free one)")
    add("--labels", type=_labels, help="names of the output's entries, separated by commas")
    add("--rollout", choices=("probabilities", "logits", "value"),
        help="how an output becomes the next input in a rollout")  # fmt: skip
    add(
        "--task",
        choices=("forecast", "classify", "text", "audio"),
        help="what the model is for: how the server's page lets people try it (default: follows from its outputs)",
    )
    add("--sample-rate", type=positive, metavar="HZ", help="samples a second, for --task audio")


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
