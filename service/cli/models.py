"""The command `cellserve models`: lists the models of a repository that can be served here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cellserve.service.errors import printable

if TYPE_CHECKING:
    from cellserve.models.signature import StateSpec, TensorSpec
    from cellserve.service.model_repository.model import Model

_UNBOUNDED = 100_000  # columns

EPILOG = """\
example:
  cellserve models --models artifacts
  cellserve models --json

Lists the newest valid version of each model; the exit status is 1 if there is none.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table of the models; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="cellserve models",
        description="Lists the models of a repository, as the service would open them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=Path, help="the model repository (CELLSERVE_MODELS; default: artifacts)")
    parser.add_argument("--json", action="store_true", help="print what GET /models/{name} returns for each")
    arguments = parser.parse_args(argv)
    # Here and not above, so that --help answers at once.
    from pydantic import ValidationError

    from cellserve.service.model_repository.errors import BrokenModel
    from cellserve.service.model_repository.repository import Repository
    from cellserve.service.runtime.onnx_model import RuntimeOptions
    from cellserve.service.settings import Settings, explain_invalid

    try:
        settings = Settings()
    except ValidationError as error:
        print(f"cellserve models: {explain_invalid(error)}", file=sys.stderr)
        return 2
    repository = Repository(
        arguments.models or settings.models, RuntimeOptions(), settings.max_batch, settings.max_model_bytes
    )
    try:
        repository.scan()
    except BrokenModel as broken:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"cellserve models: {broken}", markup=False)
        return 1
    models = []
    for versions in repository.by_name().values():
        for version in versions:
            try:
                models.append(repository.open(version.key))
            except BrokenModel:
                continue  # the reason is logged
            break
    console = Console(width=None if sys.stdout.isatty() else _UNBOUNDED)  # a pipe has no width: cut nothing
    if arguments.json:
        console.out(json.dumps({"models": [model.described() for model in models]}, indent=2), highlight=False)
    else:
        console.print(_table(models))
    return 0 if models else 1


def _table(models: Iterable[Model]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("model", "version", "takes", "gives", "states", "form", "precision", "exact", "test metrics"):
        table.add_column(heading, overflow="fold")
    for model in models:
        document, signature = model.document, model.document.signature
        cells = (
            model.name,
            str(model.version),
            _specs(signature.inputs),
            _specs(signature.outputs),
            _specs(signature.states) if signature.predict_only is None else "whole sequences only",
            document.form,
            document.precision,
            f"yes, {model.exactness.shapes}" if model.exactness.proved else "no",
            ", ".join(f"{metric} {value:.4g}" for metric, value in document.metrics.items()),
        )
        table.add_row(*(escape(printable(cell)) for cell in cells))
    return table


def _specs(specs: Sequence[TensorSpec | StateSpec]) -> str:
    return ", ".join(f"{spec.name} {list(spec.shape)}" for spec in specs)
