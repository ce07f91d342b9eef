"""The command `cellserve models`: what a repository holds, and whether it can be served here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

EPILOG = """\
example:
  cellserve models --models artifacts

The newest version of each that is sound would be served; the exit status is 1 where none could be.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table of the models; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="cellserve models",
        description="Lists the models of a repository, as the service would open them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", type=Path, default=Path("artifacts"), help="the repository (default: artifacts)")
    folder = parser.parse_args(argv).models
    # Here and not above, so that --help answers at once.
    from service.repository import BrokenModel, Repository
    from service.runtime import RuntimeOptions
    from service.settings import Settings

    settings = Settings()
    repository = Repository(folder, RuntimeOptions(), settings.max_batch, settings.max_model_bytes)
    try:
        repository.scan()
    except BrokenModel as broken:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"cellserve models: {broken}", markup=False)
        return 1
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("model", "version", "takes", "gives", "states", "form", "precision", "exact", "test metrics"):
        table.add_column(heading)
    for versions in repository.by_name().values():
        for version in versions:
            try:
                model = repository.open(version.key)
            except BrokenModel:
                continue  # the log has told why
            document, signature = model.document, model.document.signature
            table.add_row(
                model.name,
                str(model.version),
                ", ".join(f"{spec.name} {list(spec.shape)}" for spec in signature.inputs),
                ", ".join(f"{spec.name} {list(spec.shape)}" for spec in signature.outputs),
                ", ".join(f"{spec.name} {list(spec.shape)}" for spec in signature.states)
                if signature.predict_only is None
                else "whole sequences only",
                document.form,
                document.precision,
                "yes" if model.exactness.proved else "no",
                ", ".join(f"{metric} {value:.4g}" for metric, value in document.metrics.items()),
            )
            break
    Console().print(table)
    return 0 if table.row_count else 1
