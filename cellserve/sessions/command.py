"""The command `cellserve sessions`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from cellserve.sessions.arguments import KEY_VARIABLE, STORE_VARIABLE, parse
from cellserve.sessions.errors import NoSession, SessionFailed, SessionsError

_UNBOUNDED = 100_000  # columns
_LMDB = "lmdb:"
_TOLD = 10  # failures of many sessions that are printed one by one

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of the commands; returns the exit status: 0, 1 if something failed, 2 for wrong arguments."""
    given = parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("cellserve").addHandler(logging.NullHandler())  # what matters is in the errors
    try:
        return _COMMANDS[given.command](given)
    except SessionsError as error:
        _complain(str(error))
        return 1
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _list(given: argparse.Namespace) -> int:
    from cellserve.sessions import tables

    with closing(_place(given)) as place:
        found = list(islice(place.sessions(), given.limit + 1 if given.limit else None))
    more = bool(given.limit) and len(found) > given.limit
    found = found[: given.limit or None]
    if given.json:
        _print_json({"sessions": [tables.listed(one) for one in found], "more": more})
    elif found:
        _console().print(tables.table_of(found))
        if more:
            print(f"These are the first {given.limit} sessions: --limit 0 lists all.", file=sys.stderr)
    else:
        print(f"There are no sessions in {place.name}.", file=sys.stderr)
    return 0


def _show(given: argparse.Namespace) -> int:
    from cellserve.sessions import tables

    with closing(_place(given)) as place:
        document = tables.shown(place.read(given.session), place.name)
    if given.json:
        _print_json(document)
    else:
        _console().print(*tables.tables_of(document), sep="\n")
    return 0


def _export(given: argparse.Namespace) -> int:
    from cellserve.sessions import session_file

    to: Path = given.to
    as_file = to.suffix == session_file.SUFFIX and not to.is_dir()
    if as_file and (given.all or len(given.sessions) > 1):
        raise SessionsError(f"{to} is the name of one file: give the name of a folder for several sessions")
    written, failures = [], Failures()
    with closing(_place(given)) as place:
        names = (one.name for one in place.sessions()) if given.all else iter(given.sessions)
        for name in _with_progress(names, "exported"):
            file = to if as_file else to / session_file.name_of(name)
            try:
                place.read(name).session.write(file)
                written.append({"session": name, "file": str(file)})
            except NoSession as error:
                if not given.all:  # otherwise it has ended since it was listed
                    failures.add(error)
            except SessionFailed as error:
                failures.add(error)
    return _tell(given, failures, {"exported": written}, f"{_count(len(written), 'session')} exported to {to}")


def _import(given: argparse.Namespace) -> int:
    from cellserve.sessions import session_file

    files = [file for one in given.files for file in session_file.files_in(one)]
    written: list[str] = []
    there: list[str] = []
    failures = Failures()
    with closing(_place(given)) as place:
        for file in _with_progress(files, "imported"):
            try:
                session = session_file.read(file)
                if given.owner is not None:
                    session = replace(session, owner=given.owner)
                (written if place.write(session, given.replace) else there).append(session.name)
            except SessionFailed as error:
                failures.add(error)
        told = f"{_count(len(written), 'session')} imported to {place.name}"
    if there:
        told += f"; {len(there)} had been there already, the same"
    return _tell(given, failures, {"imported": written, "there": there}, told)


def _backup(given: argparse.Namespace) -> int:
    return _copy(given, _folder(given), given.to, "backup")


def _restore(given: argparse.Namespace) -> int:
    return _copy(given, given.backup, _folder(given), "store")


def _copy(given: argparse.Namespace, source: Path, target: Path, what: str) -> int:
    from cellserve.service.sessions.stores.lmdb.backup import back_up
    from cellserve.service.sessions.stores.protocol import StoreUnusable
    from cellserve.sessions.tables import size

    try:
        copied = back_up(source, target)
    except StoreUnusable as error:
        raise SessionsError(str(error)) from None
    if given.json:
        _print_json({"folder": str(target), "sessions": copied.sessions, "shards": copied.shards,
                     "bytes": copied.bytes, "one_moment": copied.one_moment})  # fmt: skip
        return 0
    print(f"{target} is a {what} with {_count(copied.sessions, 'session')} ({size(copied.bytes)}).")
    if not copied.one_moment:
        print(f"Its {copied.shards} shards are from moments a few milliseconds apart: its workers never paused.")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "export": _export,
    "import": _import,
    "backup": _backup,
    "restore": _restore,
}


class Failures:
    """Failures of single sessions, which do not keep the others from being done; the first few are printed at once."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def add(self, error: SessionFailed) -> None:
        """Tells and counts a failure."""
        self.all.append(str(error))
        if len(self.all) <= _TOLD:
            _complain(str(error))


def _tell(given: argparse.Namespace, failures: Failures, document: dict[str, Any], told: str) -> int:
    """Prints what was done and how much failed; returns the exit status."""
    if given.json:
        _print_json({**document, "failed": failures.all})
    else:
        print(f"{told}.")
    if len(failures.all) > _TOLD:
        _complain(f"{len(failures.all) - _TOLD} more failed (--json has all)")
    return 1 if failures.all else 0


def _place(given: argparse.Namespace) -> Any:
    """Returns the place with sessions that the arguments or the environment name; raises SessionsError."""
    settings = _settings(given)
    if given.url is not None or settings.store == "memory":
        if given.store is not None:
            raise SessionsError("--store: sessions in memory are those of a running server: give its --url")
        from cellserve.sessions.server import Server

        return Server(given.url or f"http://127.0.0.1:{settings.port}", _key(given.key_file))
    from cellserve.sessions.models import Models

    models = Models(getattr(given, "models", None) or settings.models, settings.max_model_bytes)
    if settings.store.startswith(_LMDB):
        from cellserve.sessions.stores import LmdbFolder

        return LmdbFolder(_folder(given), settings, models)
    try:
        from cellserve.sessions.redis_store import RedisStore
    except ModuleNotFoundError as error:
        raise SessionsError(f"--store needs {error.name}: in a clone, pip install '.[redis]'") from None
    return RedisStore(settings, models)


def _folder(given: argparse.Namespace) -> Path:
    """Returns the folder of the store that is given; raises SessionsError."""
    store = _settings(given).store
    folder = store.removeprefix(_LMDB)
    if not store.startswith(_LMDB) or not folder:
        which = f"{STORE_VARIABLE}: " if given.store is None else "--store: "
        raise SessionsError(f"{which}give the folder of a store, --store lmdb:FOLDER")
    return Path(folder)


def _settings(given: argparse.Namespace) -> Any:
    """Returns the settings in the environment, with the store that is given."""
    from pydantic import ValidationError

    from cellserve.service.settings import Settings, explain_invalid

    flags = {} if given.store is None else {"store": given.store}
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise SessionsError(explain_invalid(error, flags)) from None


def _key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise SessionsError(f"--key-file: {file}: {getattr(error, 'strerror', None) or 'it holds no key'}") from None
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise SessionsError(f"--key-file: {file} must hold one key and nothing else")
    return key


def _console() -> Any:
    from rich.console import Console

    # A pipe has no width: cut nothing.
    return Console(width=None if sys.stdout.isatty() else _UNBOUNDED, highlight=False)


def _with_progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterates over items; if a person looks on, it is shown how many are done."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    total = len(items) if isinstance(items, list) else None
    return iter(track(items, what, total, console=console, transient=True, disable=not console.is_terminal))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def _complain(message: str) -> None:
    from cellserve.service.errors import printable

    print(f"cellserve sessions: {printable(message)}", file=sys.stderr)
