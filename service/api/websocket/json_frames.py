"""The JSON frames of `WS /stream`, as msgspec structs."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import orjson

from cellserve.service.api.step_codec import Position


class _Frame(msgspec.Struct, tag_field="op", kw_only=True, forbid_unknown_fields=True):
    ref: msgspec.Raw = msgspec.Raw(b"null")  # returned with the answer


class Open(_Frame, tag="open", kw_only=True):
    """Creates a session."""

    model: str | None = None
    states: msgspec.Raw = msgspec.Raw(b"null")
    session: str | None = None


class Auth(_Frame, tag="auth", kw_only=True):
    """Authenticates in the first frame: browsers cannot send headers with a socket."""

    key: str


class Attach(_Frame, tag="attach", kw_only=True):
    """Returns a handle for an existing session."""

    session: str


class Step(_Frame, tag="step", kw_only=True):
    """Steps a session, given by its handle or id."""

    session: int | str
    x: msgspec.Raw
    outputs: Literal["last", "all"] | None = None
    position: Position | None = None


class SimpleStep(_Frame, tag="step", kw_only=True):
    """The most common step, one time step of plain numbers."""

    session: int | str
    x: list[float] | int
    outputs: Literal["last", "all"] | None = None
    position: Position | None = None


class Reset(_Frame, tag="reset", kw_only=True):
    """Sets a session's state to zeros."""

    session: int | str
    position: Position | None = None


class Fork(_Frame, tag="fork", kw_only=True):
    """Creates a session with the state of another one."""

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
simple_step_decoder = msgspec.json.Decoder(SimpleStep)


class _Ref(msgspec.Struct):
    ref: msgspec.Raw = msgspec.Raw(b"null")


_ref_decoder = msgspec.json.Decoder(_Ref)


def ref_of(text: bytes) -> Any:
    """Returns the ref of an invalid frame, None if it cannot be parsed."""
    try:
        return orjson.Fragment(bytes(_ref_decoder.decode(text).ref))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
