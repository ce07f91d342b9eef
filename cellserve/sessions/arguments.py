"""The arguments of `cellserve sessions`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

KEY_VARIABLE, STORE_VARIABLE = "CELLSERVE_API_KEY", "CELLSERVE_STORE"

_EXAMPLES = {
    "": """\
examples:
  cellserve sessions list                                    # of the server at http://127.0.0.1:8000
  cellserve sessions show ID --store lmdb:/var/lib/cellserve
  cellserve sessions backup /backups/monday --store lmdb:/var/lib/cellserve

docs/explanation/store.md says what a backup promises, and what an exported session keeps.
""",
    "list": """\
examples:
  cellserve sessions list --url http://127.0.0.1:8000 --key-file alice.key
  cellserve sessions list --store lmdb:/var/lib/cellserve --limit 0 --json
""",
    "show": """\
example:
  cellserve sessions show 56a4dbfe9d1e5634da2529fe3474ad9a --store redis://127.0.0.1:6379/0
""",
    "export": """\
examples:
  cellserve sessions export alice/56a4dbfe --store lmdb:/var/lib/cellserve --to one.safetensors
  cellserve sessions export --all --url http://127.0.0.1:8000 --to exported
""",
    "import": """\
example:
  cellserve sessions import exported --store redis://127.0.0.1:6379/0

Into a store, sessions keep everything that their files have. Into a running server (--url) they come as its API takes
them: they belong to the key's owner, and are at position 1.
""",
    "backup": """\
example:
  cellserve sessions backup /backups/monday --store lmdb:/var/lib/cellserve

The server goes on. A server can use the backup as it is (--store lmdb:/backups/monday), or `restore` copies it.
""",
    "restore": """\
example:
  cellserve sessions restore /backups/monday --store lmdb:/var/lib/cellserve
""",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments: `command`, and its own."""
    parser = argparse.ArgumentParser(
        prog="cellserve sessions",
        description="Looks into a store of sessions, moves sessions between stores, and makes backups.",
        epilog=_EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=description, description=f"{description[0].upper()}{description[1:]}.", epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    listing = command("list", "list sessions")
    listing.add_argument("--limit", type=_count, default=1000, help="sessions to list, 0 for all (default: 1000)")
    show = command("show", "show a session and its states")
    show.add_argument("session", metavar="ID", help="as `list` shows it: OWNER/ID in a store, if it has an owner")
    export = command("export", "write sessions to files, as safetensors")
    export.add_argument("sessions", nargs="*", metavar="ID", help="as `list` shows it")
    export.add_argument("--all", action="store_true", help="all sessions")
    export.add_argument("--to", type=Path, required=True, metavar="PATH",
        help="a folder, or for one session a file that ends in .safetensors")  # fmt: skip
    importing = command("import", "create sessions from exported files")
    importing.add_argument("files", nargs="+", type=Path, metavar="FILE", help="an exported file, or a folder of them")
    importing.add_argument("--replace", action="store_true", help="replace sessions of the same names")
    importing.add_argument("--owner", type=_owner,
        help="whose the sessions are, in place of what their files say; '' where no keys are used")  # fmt: skip
    for parser_ in (listing, show, export, importing):
        place = parser_.add_mutually_exclusive_group()
        place.add_argument("--url",
            help=f"a running server (default: http://127.0.0.1:8000, or the store in {STORE_VARIABLE})")  # fmt: skip
        place.add_argument("--store", help="a store, used by a server or not: lmdb:FOLDER or redis://HOST:PORT/DB")
        parser_.add_argument("--key-file", type=Path, metavar="FILE",
            help=f"holds the API key of the sessions' owner, with --url (default: that in {KEY_VARIABLE})")  # fmt: skip
    for parser_ in (show, export):
        parser_.add_argument(
            "--models", type=Path, metavar="FOLDER", help="repository with the sessions' models (default: artifacts)"
        )
    backup = command("backup", "copy a store of LMDB, also while a server uses it")
    backup.add_argument("to", type=Path, metavar="FOLDER", help="the copy; a folder that does not exist, or is empty")
    restore = command("restore", "copy a backup to the folder of a store, which must not exist or be empty")
    restore.add_argument("backup", type=Path, metavar="FOLDER", help="the backup")
    for parser_ in (backup, restore):
        parser_.add_argument("--store", help=f"the store, lmdb:FOLDER (default: that in {STORE_VARIABLE})")
    for parser_ in commands.choices.values():
        parser_.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    if given.command == "export" and bool(given.sessions) == given.all:
        export.error("give the IDs of sessions, or --all")
    return given


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of sessions")
    return int(text)


def _owner(text: str) -> str:
    if not all(one.isascii() and (one.isalnum() or one in "._-") for one in text) or len(text) > 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not an owner: up to 64 letters, digits, '.', '_' and '-'")
    return text
