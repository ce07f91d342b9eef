"""The command `cellserve train`: trains the example networks and saves them for `cellserve export`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

# As in models.training, whose import takes seconds. The README begins with the first ones.
EXAMPLES = ("sunspots", "vowels", "sunspots-jordan", "characters")

EPILOG = """\
example:
  cellserve train                          all of them
  cellserve train vowels --folder trained

writes FOLDER/NAME.keras, NAME.card.json (labels, test metrics) and NAME.npz (the test data), for `cellserve export`.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="cellserve train",
        description="Trains the example networks on real data, from a fixed seed, and prints the test metrics.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"which: {', '.join(EXAMPLES)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("trained"), help="output folder (default: trained)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parser().parse_args(argv)
    unknown = [name for name in arguments.names if name not in EXAMPLES]
    if unknown:
        print(f"cellserve train: no example {unknown[0]!r}: one of {', '.join(EXAMPLES)}", file=sys.stderr)
        return 2
    try:
        train_all(arguments.names or EXAMPLES, arguments.folder, Console())
    except (ImportError, OSError) as error:
        print(f"cellserve train: {error}", file=sys.stderr)
        return 1
    return 0


def train_all(names: Sequence[str], folder: Path, console: Console) -> None:
    """Trains the named examples into a folder, a progress bar each.

    Raises:
        ImportError: TensorFlow is not installed.
        OSError: The folder cannot be written to.
    """
    columns = TextColumn("{task.description:16}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[figure]}")
    with Progress(*columns, console=console) as bars:
        tasks = {name: bars.add_task(name, total=None, figure="waiting", start=False) for name in names}
        from cellserve.models.tensorflow_import import import_tensorflow

        import_tensorflow()
        from cellserve.models.training import save, train

        for name, task in tasks.items():
            bars.start_task(task)

            def show(done: int, of: int, figure: str, task: object = task) -> None:
                bars.update(task, completed=done, total=of, figure=figure)  # type: ignore[arg-type]

            trained = train(name, show)
            save(trained, folder, name)
            metrics = ", ".join(f"{metric} {value:.4g}" for metric, value in trained.card["metrics"].items())
            bars.update(task, figure="trained")
            bars.print(f"{name}: test {metrics}", soft_wrap=True)  # in one line, even on a narrow terminal
