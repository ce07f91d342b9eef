"""The JSON frames of `WS /stream`, as msgspec structs."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from numpy.typing import NDArray

from cellserve.service.errors import InvalidInput
from cellserve.service.validation.json_bodies import LEFT_OUT, Position
from cellserve.service.validation.json_input import TensorDecoder, decode

Array = NDArray[Any]

_LONGEST_REF = 200  # bytes: errors repeat it


class _Frame(msgspec.Struct, tag_field="op", kw_only=True, forbid_unknown_fields=True):
    ref: msgspec.Raw = msgspec.Raw(b"null")  # returned with the answer


class Open(_Frame, tag="open", kw_only=True):
    """Creates a session."""

    model: str | None = None
    states: msgspec.Raw = LEFT_OUT
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
_decoder: msgspec.json.Decoder[Frame] = msgspec.json.Decoder(Frame)
auth_decoder = msgspec.json.Decoder(Auth)
simple_step_decoder = msgspec.json.Decoder(SimpleStep)


class _Ref(msgspec.Struct):
    ref: msgspec.Raw = msgspec.Raw(b"null")


_ref_decoder = msgspec.json.Decoder(_Ref)


def read(text: bytes) -> Frame:
    """Decodes a frame; raises InvalidInput or NotJson."""
    frame = decode(_decoder, text)
    if len(bytes(frame.ref)) > _LONGEST_REF:
        raise InvalidInput(f"ref: send at most {_LONGEST_REF} bytes of JSON", place="ref")
    return frame


def read_head(text: bytes) -> Frame:
    """Decodes a frame, without its tensors."""
    frame = read(text)
    if isinstance(frame, Step):
        frame.x = LEFT_OUT
    elif isinstance(frame, Open):
        frame.states = LEFT_OUT
    return frame


def read_x(reader: TensorDecoder, text: bytes) -> tuple[Array, bool]:
    """Returns the time steps in a `step` frame, and whether it was one without a time axis."""
    frame = decode(_decoder, text)
    assert isinstance(frame, Step)
    return reader.x(frame.x)


def read_states(reader: TensorDecoder, text: bytes) -> dict[str, Array] | None:
    """Returns the states in an `open` frame; None for zeros."""
    frame = decode(_decoder, text)
    assert isinstance(frame, Open)
    return None if frame.states == LEFT_OUT else reader.state(frame.states)


def ref_of(text: bytes) -> bytes | None:
    """Returns the JSON of an invalid frame's ref, None if it cannot be parsed or is too long."""
    try:
        ref = bytes(_ref_decoder.decode(text).ref)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return ref if len(ref) <= _LONGEST_REF else None


def bearer_header(key: str) -> tuple[bytes, bytes]:
    """Returns the header equivalent to an `auth` frame's key."""
    return b"authorization", b"Bearer " + key.encode()
