"""The command `cellserve adopt`; imports no TensorFlow."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cellserve.export.cli.options import Parser, add_shared, positive
from cellserve.export.errors import ExportError

EXAMPLE = """\
example:
  cellserve adopt lstm.onnx --name mine
  cellserve adopt model.onnx --name mine --state h0=hn:batch_axis=1 --state c0=cn:batch_axis=1 --input x
  cellserve adopt silero_vad.onnx --name vad --constant sr=16000 --dim input.1=576 --context input=64

States are found by names and shapes: h and hn, state and stateN, past_x and present_x, x_in and x_out. Nothing is
written unless the model agrees with the original graph, and it is known how its bits stay the same.
docs/how-to/adopt.md explains all of this.
"""


def parser() -> Parser:
    """Returns the parser of the command's arguments."""
    parser = Parser(
        prog="cellserve adopt",
        description="Takes a stateful ONNX model that was made elsewhere (PyTorch, say) into the repository.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL.onnx", type=Path, help="the file, its external data (if any) beside it")
    add_shared(parser)
    add("--state", dest="states", type=_state, action="append", default=[], metavar="IN=OUT[:batch_axis=N]",
        help="an input and the output that is its next state; repeatable")  # fmt: skip
    add("--input", dest="inputs", type=_input, action="append", default=[], metavar="NAME[:batch_axis=N]...",
        help="an input of a time step; options :batch_axis=none, :time_axis=N or none, :bounds=0..255")  # fmt: skip
    add("--output", dest="outputs", type=_output, action="append", default=[], metavar="NAME[:batch_axis=N]...",
        help="an output to return (default: all but next states); options :batch_axis=N, :time_axis=N")  # fmt: skip
    add("--constant", dest="constants", type=_pair, action="append", default=[], metavar="NAME=VALUE",
        help="an input that is always the same; JSON, lists for tensors")  # fmt: skip
    add("--dim", dest="dims", type=_sized, action="append", default=[], metavar="NAME=SIZE",
        help="the size of a dynamic dimension; one without a name is INPUT.AXIS")  # fmt: skip
    add("--context", dest="contexts", type=_context, action="append", default=[],
        metavar="NAME=ENTRIES[:axis=N]",
        help="put the last entries of an input, along an axis, before those of its next step")  # fmt: skip
    add("--description", default="", help="description for GET /models")
    add("--default-output", choices=("last", "all"), default="all",
        help="outputs returned for requests of many time steps (default: all)")  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 if nothing was written, 2 for invalid arguments."""
    arguments = parser().parse(argv)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for name in ("constants", "dims", "contexts"):
        arguments[name] = dict(arguments[name])
    for name in ("states", "inputs", "outputs"):
        arguments[name] = tuple(arguments[name])
    try:
        # Imported here, so that --help and argument errors are immediate.
        from cellserve.export.adopt.adopt import AdoptRequest, adopt

        adopt(AdoptRequest(**arguments), Console())
    except ModuleNotFoundError as error:
        how = "in a clone, pip install '.[adopt]'"
        errors.print(f"cellserve adopt: {error.name} is not installed: {how}", markup=False)
        return 1
    except (ExportError, OSError) as error:
        line = " ".join(str(error).split())  # a name in the graph may have line breaks
        errors.print(f"cellserve adopt: {line}", markup=False)
        return 1
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def _sized(text: str) -> tuple[str, int]:
    name, size = _pair(text)
    return name, positive(size)


def _context(text: str) -> tuple[str, object]:
    from cellserve.export.adopt.tensor_roles import Context

    names, options = _split_options(text, ("axis",))
    name, entries = _sized(names)
    return name, Context(entries, _axis(options, "axis"))


def _state(text: str) -> object:
    from cellserve.export.adopt.tensor_roles import StateFlag

    names, options = _split_options(text, ("batch_axis",))
    name, following = _pair(names)
    return StateFlag(name, following, _axis(options, "batch_axis", optional=True))


def _output(text: str) -> object:
    from cellserve.export.adopt.tensor_roles import OutputFlag

    name, options = _split_options(text, ("batch_axis", "time_axis"))
    return OutputFlag(name, _axis(options, "batch_axis", optional=True), _axis(options, "time_axis"))


def _input(text: str) -> object:
    from cellserve.export.adopt.tensor_roles import InputFlag

    name, options = _split_options(text, ("batch_axis", "time_axis", "bounds"))
    batch_axis, time_axis = (_axis(options, key, optional=True) for key in ("batch_axis", "time_axis"))
    bounds = None
    if "bounds" in options:
        found = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", options["bounds"])
        if not found or int(found[1]) > int(found[2]):
            raise argparse.ArgumentTypeError(f"bounds={options['bounds']}: expected FIRST..LAST, such as 0..255")
        bounds = int(found[1]), int(found[2])
    return InputFlag(name, batch_axis, time_axis, bounds)


def _split_options(text: str, keys: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Splits a name, which may contain colons itself, from the options after it: `x:0:batch_axis=1`."""
    options = {}
    while (found := re.fullmatch(rf"(.+):({'|'.join(keys)})=([^:]+)", text)) is not None:
        text, options[found[2]] = found[1], found[3]
    return text, options


def _axis(options: dict[str, str], key: str, optional: bool = False) -> int | None:
    """The axis that an option gives, None if it is not given; NO_AXIS for `none` if the axis is optional."""
    from cellserve.export.adopt.tensor_roles import NO_AXIS

    text = options.get(key)
    if text is None:
        return None
    if optional and text == "none":
        return NO_AXIS
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{key}={text}: expected a number from 0{' or none' if optional else ''}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
