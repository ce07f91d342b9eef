"""The command `cellserve`: dispatches to the command line of each part, which is imported only when it is called."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

COMMANDS = {
    "serve": ("cellserve.service.cli.serve", "serve the models of a repository over HTTP", "cpu]' or '.[gpu"),
    "key": ("cellserve.service.cli.key", "create an API key", "cpu]' or '.[gpu"),
    "models": ("cellserve.service.cli.models", "list the models of a repository", "cpu]' or '.[gpu"),
    "sessions": ("cellserve.sessions.command", "look into a store, move sessions, make backups", "cpu"),
    "bench": ("cellserve.benchmark.command", "measure a server with a model of yours", "bench"),
    "train": ("cellserve.models.training_cli", "train the example networks", "export"),
    "export": ("cellserve.export.cli.export", "export a saved Keras network as a model to serve", "export"),
    "examples": ("cellserve.export.cli.examples", "train and export the example models, and serve them", "export"),
    "adopt": ("cellserve.export.cli.adopt", "adopt a stateful ONNX model made elsewhere", "adopt"),
}

START = """\
Cellserve serves recurrent networks: whole sequences, or step by step with the state kept in sessions.

To see it work:
  cellserve examples --serve                     trains models on real data, serves them on http://127.0.0.1:8000

To serve a model of yours:
  cellserve export my_network.keras --name mine  takes a Keras network into the repository, the folder artifacts/
  cellserve adopt my_model.onnx --name mine      takes a stateful ONNX model that was made elsewhere
  cellserve serve                                serves the repository

`cellserve --help` lists all commands, `cellserve COMMAND --help` the options of one.
"""

HELP = """\
usage: cellserve COMMAND ...

Exports recurrent networks from Keras to ONNX and serves them in stateful sessions, bit for bit.

commands:
{commands}

examples:
  cellserve serve --port 8000
  cellserve export my_network.keras --name mine

Run `cellserve COMMAND --help` for the options of a command, `cellserve --version` for the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, 2 if there is no such command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(START, end="")
        return 2
    if arguments[0] in ("-V", "--version"):
        print(f"cellserve {importlib.metadata.version('cellserve')}")
        return 0
    if arguments[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:10}{what}" for name, (_, what, _) in COMMANDS.items())
        print(HELP.format(commands=lines), end="")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        print(f"cellserve: there is no command {name!r}{meant}: choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _, extra = COMMANDS[name]
    try:
        try:
            command = importlib.import_module(module)
        except ModuleNotFoundError as error:
            how = f"in a clone, pip install '.[{extra}]'"
            print(f"cellserve {name}: {error.name} is not installed: {how}", file=sys.stderr)
            return 1
        return int(command.main(rest))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
