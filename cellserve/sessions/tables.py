"""Sessions as tables for people and as documents for programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cellserve.service.errors import printable
from cellserve.service.sessions.session import time_text
from cellserve.sessions.place import Found, Listed

_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def table_of(sessions: Sequence[Listed]) -> Table:
    """Returns a table of sessions."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    headings = ["session", "model", "version", "position", "age"]
    if any(one.expires_in is not None for one in sessions):
        headings.append("expires in")
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in ("version", "position") else "left")
    for one in sessions:
        if one.unreadable:
            table.add_row(*map(_text, (one.name, f"not a session: {one.unreadable}")))
        else:
            times = _age(one.created_at), duration(one.expires_in)
            row = one.name, one.model, str(one.version), str(one.position), *times
            table.add_row(*map(_text, row[: len(headings)]))
    return table


def listed(session: Listed) -> dict[str, Any]:
    """Returns a document of a session in a list."""
    if session.unreadable:
        return {"session": session.name, "unreadable": session.unreadable}
    return {
        "session": session.name,
        "model": session.model,
        "version": session.version,
        "position": session.position,
        "created_at": _time(session.created_at),
        "expires_in": session.expires_in,
    }


def shown(found: Found, place: str) -> dict[str, Any]:
    """Returns a document of a session and its states."""
    session, last = found.session, found.session.last
    return {
        "session": session.id,
        "owner": session.owner,
        "model": session.model,
        "version": session.version,
        "digest": session.digest,
        "position": session.position,
        "created_at": _time(session.created_at),
        "expires_in": found.expires_in,
        "store": place,
        "durable": found.durable,
        "last_change": None if last is None else {"position": last.position, "position_after": last.position_after},
        "states": {
            name: {
                "dtype": str(state.dtype),
                "shape": list(state.shape),
                **({"min": state.min().item(), "mean": state.mean().item(), "max": state.max().item()} if state.size
                   else {}),
            }
            for name, state in session.states.items()
        },
    }  # fmt: skip


def tables_of(document: dict[str, Any]) -> tuple[Table, Table]:
    """Returns what `shown` tells as two tables: the session, and its states."""
    about = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    last = document["last_change"]
    owner = {None: "the key's", "": "none"}.get(document["owner"], document["owner"])
    for heading, value in (
        ("session", document["session"]),
        ("owner", owner),
        ("model", f"{document['model']}:{document['version']} (digest {document['digest'][:12]}...)"),
        ("position", document["position"]),
        ("created at", document["created_at"] or ""),
        ("expires in", duration(document["expires_in"])),
        ("store", f"{document['store']} (durable: {document['durable']})"),
        ("repeatable", "" if last is None else f"the change from {last['position']} to {last['position_after']}"),
    ):
        if value != "":
            about.add_row(heading, Text(printable(str(value)), overflow="fold"))
    states = Table(box=box.SIMPLE_HEAD)
    for heading in ("state", "type", "shape", "min", "mean", "max"):
        states.add_column(heading, justify="left" if heading in ("state", "type", "shape") else "right")
    for name, state in document["states"].items():
        numbers = [f"{state[one]:.6g}" if one in state else "" for one in ("min", "mean", "max")]
        states.add_row(_text(name), state["dtype"], Text(str(state["shape"])), *numbers)
    return about, states


def _text(text: str) -> Text:
    return Text(printable(text))


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else time_text(seconds)


def _age(created_at: float | None) -> str:
    return "" if created_at is None else duration(time.time() - created_at)


def duration(seconds: float | None) -> str:
    """Returns a duration in the largest unit that fits."""
    if seconds is None:
        return ""
    for unit, size in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def size(count: float) -> str:
    """Returns a number of bytes in the largest unit that fits."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
