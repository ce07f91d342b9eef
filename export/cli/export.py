"""The command `cellserve export`; imports TensorFlow only to run an export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cellserve.export.cli.options import Parser, add_shared
from cellserve.export.errors import ExportError
from cellserve.export.publish.request import ExportRequest
from cellserve.export.report.progress import Stages

EXAMPLE = """\
example:
  cellserve export trained/vowels.keras --name vowels
  cellserve export my_network.keras --name mine --import my_cells.py --labels yes,no --data test.npz
  cellserve export my_network.keras --name mine --quantize int8 --data test.npz --tolerance 0.02

Two files beside NETWORK.keras are read if they exist: NETWORK.card.json (labels, metrics, description, default_output,
rollout), which arguments override, and NETWORK.npz (test data: x [n, time, features], lengths [n], y; several inputs
or outputs by their names). Nothing is written unless the proofs hold.
"""


def parser(prog: str = "cellserve export") -> Parser:
    """Returns the parser of the command's arguments."""
    parser = Parser(
        prog=prog,
        description="Turns a saved Keras network of recurrent layers into one ONNX file that steps exactly.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("network", metavar="NETWORK.keras", type=Path, help="the saved Keras model")
    add_shared(parser)
    parser.add_argument("--description", help="description for GET /models (default: the card's)")
    parser.add_argument("--default-output", choices=["last", "all"],
                        help="outputs returned for requests of many time steps (default: the card's, or the network's "
                        "return_sequences)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="test data, to score the ONNX model and Keras on")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--quantize", dest="precision", choices=["int8"], default="float32",
                      help="int8 weights, and int8 products where they are faster; needs test data")  # fmt: skip
    precision.add_argument("--precision", choices=["float32", "float16"], default="float32",
                      help="float16 for half the size; needs test data (default: float32)")  # fmt: skip
    parser.add_argument("--tolerance", type=_tolerance, metavar="SHARE",
                        help="allowed loss on the test data from lower precision: of accuracy, as a share of all "
                        "sequences; of RMSE, as a share of its float32 value (default: 0.01)")  # fmt: skip
    parser.add_argument("--import", dest="imports", type=Path, action="append", default=[], metavar="FILE.py",
                        help="a Python file that registers your own cells and may import the files beside it; "
                        "repeatable")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="do not time tf2onnx's conversion and Keras beside the model; proofs remain")  # fmt: skip
    return parser


def _tolerance(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.01")
    return share


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 if nothing was written, 2 for invalid arguments."""
    arguments = parser().parse(argv)
    request = ExportRequest(**{**arguments, "imports": tuple(arguments["imports"])})
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    console = Console()
    try:
        request.check()
        with Stages(console) as progress:
            progress("importing TensorFlow")
            from cellserve.models.tensorflow_import import import_tensorflow

            import_tensorflow()
            from cellserve.export.exporter import write_model
            from cellserve.export.report.console import show

            folder, results = write_model(request, progress)
        show(console, folder, results)
    except (ExportError, ImportError, OSError) as error:
        errors.print(f"cellserve export: {error}", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
