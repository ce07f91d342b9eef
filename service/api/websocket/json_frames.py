"""The JSON frames of `WS /stream`, as msgspec reads them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import orjson

from cellserve.service.api.step_codec import Position


class _Frame(msgspec.Struct, tag_field="op", kw_only=True, forbid_unknown_fields=True):
    ref: msgspec.Raw = msgspec.Raw(b"null")  # comes back with the answer


class Open(_Frame, tag="open", kw_only=True):
    """Creates a session."""

    model: str | None = None
    states: msgspec.Raw = msgspec.Raw(b"null")
    session: str | None = None


class Auth(_Frame, tag="auth", kw_only=True):
    """Says who it is, in the first frame: a browser can send no header with a socket."""

    key: str


class Attach(_Frame, tag="attach", kw_only=True):
    """Gives a handle for a session that was opened elsewhere."""

    session: str


class Step(_Frame, tag="step", kw_only=True):
    """Steps a session, named by its handle or its id."""

    session: int | str
    x: msgspec.Raw
    outputs: Literal["last", "all"] | None = None
    position: Position | None = None


class PlainStep(_Frame, tag="step", kw_only=True):
    """What nearly every step is, one time step of plain numbers."""

    session: int | str
    x: list[float] | int
    outputs: Literal["last", "all"] | None = None
    position: Position | None = None


class Reset(_Frame, tag="reset", kw_only=True):
    """Sets a session's state to zeros."""

    session: int | str
    position: Position | None = None


class Fork(_Frame, tag="fork", kw_only=True):
    """Makes another session of a session's state."""

    session: int | str
    to: str | None = None
    position: Position | None = None


class Close(_Frame, tag="close", kw_only=True):
    """Deletes a session."""

    session: int | str
    position: Position | None = None


Frame = Auth | Open | Attach | Step | Reset | Fork | Close
decoder: msgspec.json.Decoder[Frame] = msgspec.json.Decoder(Frame)
auth_decoder = msgspec.json.Decoder(Auth)
plain_decoder = msgspec.json.Decoder(PlainStep)


class _Ref(msgspec.Struct):
    ref: msgspec.Raw = msgspec.Raw(b"null")


_ref_decoder = msgspec.json.Decoder(_Ref)


def ref_of(text: bytes) -> Any:
    """Gives the ref of a frame that did not fit, as far as it can be read."""
    try:
        return orjson.Fragment(bytes(_ref_decoder.decode(text).ref))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
