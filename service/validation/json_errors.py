"""Says in words what does not fit a request's JSON: where, what stands there, and what to send instead."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec.inspect import ListType, LiteralType, NoneType, StructType, Type, UnionType, type_info

from cellserve.service.errors import InvalidInput, NotJson
from cellserve.service.validation.tensor_values import JSON_NAMES, not_finite

_LONGEST_NAME = 80
_LOOKED_THROUGH = 1024 * 1024  # bytes of a body that is no JSON
_type_info = cache(type_info)


def explain_validation_error(message: str, kind: Any, body: bytes, place: str, advice: str = "") -> InvalidInput:
    """Turns msgspec's message (``Expected `float`, got `str` - at `$[3][17]` ``) into ours.

    Args:
        message: What msgspec says.
        kind: The type that was to be decoded.
        body: The JSON.
        place: Where it stands in the request.
        advice: What arrays and objects there are to be.
    """
    what, _, path = message.partition(" - at `$")
    path = path.rstrip("`")
    where = place + path if place else path.removeprefix(".")
    if what == "Number out of range":
        return not_finite(where)
    there = _at(kind, path, body)
    field = re.fullmatch(r"(?s)Object (contains unknown|missing required) field `(.*)`", what)
    value = re.fullmatch(r"(?s)Invalid (?:enum )?value (.*)", what)
    if field:
        name = field[2][:_LONGEST_NAME]
        where = f"{where}.{name}" if where else name
        what = "missing" if field[1] == "missing required" else "there is no such field"
        advice = _fields(there, name)
    elif value:
        what, advice = f"{value[1][:_LONGEST_NAME]} is none of its values", _values(there, path)
    else:
        if not (advice and ("array`" in what or "object`" in what)):
            advice = _values(there, path) or (_fields(there, "") if "Expected `object" in what else "")
        what = re.sub(r"`([a-z| ]+)`", lambda match: _words(match[1]), what)
        what = what[:1].lower() + what[1:]
    return InvalidInput(": ".join(part for part in (where, what, advice) if part), place=where)


def explain_parse_error(message: str, body: bytes, place: str) -> InvalidInput | NotJson:
    """Tells NaN and Infinity, which Python writes and JSON does not have, from what is no JSON at all."""
    if len(body) > _LOOKED_THROUGH:  # to look for the place would hold up everybody's steps
        return NotJson(f"{message}: send a JSON document in UTF-8 (NaN and Infinity are not JSON)")
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return NotJson(f"{message}: send a JSON document in UTF-8")
    for where, leaf in _everything(parsed, place):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return not_finite(where)
    return NotJson(f"{message}: send a JSON document in UTF-8")


def _at(kind: Any, path: str, body: bytes) -> Type | None:
    """Gives the type that msgspec expects at a path; of several objects that the body says which one it is."""
    found: Type | None = _chosen(_type_info(kind), body)
    for field, _ in re.findall(r"\.(\w+)|(\[)", path):
        if field and isinstance(found, StructType):
            found = next((_chosen(one.type, b"") for one in found.fields if one.encode_name == field), None)
        elif not field and isinstance(found, ListType):
            found = found.item_type
        elif not (field and isinstance(found, UnionType)):
            return None
    return found


def _chosen(kind: Type, body: bytes) -> Type:
    """Gives the one type of a union that may also be null, and of tagged objects the one that the body is."""
    if not isinstance(kind, UnionType):
        return kind
    kinds = [one for one in kind.types if not isinstance(one, NoneType)]
    if len(kinds) == 1:
        return kinds[0]
    tags = {one.tag: one for one in kinds if isinstance(one, StructType)}
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return tags[msgspec.json.decode(given[_tag_field(kind)], type=str)]
    except (msgspec.MsgspecError, KeyError, UnicodeError, RecursionError):  # of what stands behind the first misfit
        return kind


def _tag_field(kind: UnionType) -> str:
    return next((one.tag_field for one in kind.types if isinstance(one, StructType) and one.tag_field), "")


def _fields(kind: Type | None, missing: str) -> str:
    """Says which fields there are to send."""
    if isinstance(kind, UnionType) and missing == _tag_field(kind):
        return _values(kind, missing)
    if not isinstance(kind, StructType):
        return ""
    needed = [field.encode_name for field in kind.fields if field.required]
    if kind.tag_field:
        needed.insert(0, kind.tag_field)
    others = ", ".join(field.encode_name for field in kind.fields if not field.required)
    if not needed:
        return f"send what you need of {others}"
    return f"send {', '.join(needed)}" + (f", and what you need of {others}" if others else "")


def _values(kind: Type | None, path: str) -> str:
    """Says which values there are to send."""
    values: list[Any] = []
    if isinstance(kind, LiteralType):
        values = list(kind.values)
    elif isinstance(kind, UnionType) and path.removeprefix(".") == _tag_field(kind):
        values = [one.tag for one in kind.types if isinstance(one, StructType)]
    told = [json.dumps(value) for value in values]
    if len(told) > 2:
        return f"send one of {', '.join(told)}"
    return f"send {' or '.join(told)}" if told else ""


def _words(types: str) -> str:
    return " or ".join(JSON_NAMES.get(name, f"`{name}`") for name in types.split(" | "))


def _everything(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _everything(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _everything(inner, f"{place}[{number}]")
    else:
        yield place, value
