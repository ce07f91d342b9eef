"""Explanations of invalid JSON requests: where the error is, what is wrong, and what to send instead."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec.inspect import ListType, LiteralType, NoneType, StructType, Type, UnionType, type_info

from cellserve.service.errors import InvalidInput, NotJson, excerpt
from cellserve.service.validation.tensor_values import JSON_NAMES, not_finite

_LONGEST_PLACE = 100
_LARGEST_SEARCHED = 1024 * 1024  # bytes; larger bodies are not searched for NaN and Infinity
_type_info = cache(type_info)


def explain_validation_error(message: str, kind: Any, body: bytes, place: str, advice: str = "") -> InvalidInput:
    """Returns the error for a message of msgspec, such as ``Expected `float`, got `str` - at `$[3][17]` ``.

    Args:
        message: The message of msgspec's ValidationError.
        kind: The type to decode.
        body: The JSON.
        place: The place of the JSON in the request.
        advice: A description of the expected arrays and objects.
    """
    what, _, path = message.partition(" - at `$")
    path = path.rstrip("`")
    where = excerpt(place + path if place else path.removeprefix("."), _LONGEST_PLACE)
    if what == "Number out of range":
        return not_finite(where)
    there = _type_at(kind, path, body)
    field = re.fullmatch(r"(?s)Object (contains unknown|missing required) field `(.*)`", what)
    value = re.fullmatch(r"(?s)Invalid (?:enum )?value (.*)", what)
    if field:
        name = excerpt(field[2])
        where = f"{where}.{name}" if where else name
        what = "missing" if field[1] == "missing required" else "unknown field"
        advice = _field_advice(there, name)
    elif value:
        what, advice = f"{excerpt(value[1])} is not one of its values", _value_advice(there, path)
    else:
        if not (advice and ("array`" in what or "object`" in what)):
            advice = _value_advice(there, path) or (_field_advice(there, "") if "Expected `object" in what else "")
        what = re.sub(r"`([a-z| ]+)`", lambda match: _json_names(match[1]), what)
        what = what[:1].lower() + what[1:]
    return InvalidInput(": ".join(part for part in (where, what, advice) if part), place=where)


def explain_parse_error(message: str, body: bytes, place: str) -> InvalidInput | NotJson:
    """Returns the error for JSON that cannot be parsed; NaN and Infinity, which Python writes, get their own."""
    if len(body) > _LARGEST_SEARCHED:  # parsed, it would take 20 times its memory
        return NotJson(f"{message}: send a JSON document in UTF-8 (NaN and Infinity are not JSON)")
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return NotJson(f"{message}: send a JSON document in UTF-8")
    path = _first_not_finite(parsed)
    if path is None:
        return NotJson(f"{message}: send a JSON document in UTF-8")
    return not_finite(excerpt((place + path).removeprefix("."), _LONGEST_PLACE))


def _type_at(kind: Any, path: str, body: bytes) -> Type | None:
    """Returns the type that msgspec expects at a path of the body, None if unknown."""
    found: Type | None = _resolve_union(_type_info(kind), body)
    for field, _ in re.findall(r"\.(\w+)|(\[)", path):
        if field and isinstance(found, StructType):
            found = next((_resolve_union(one.type, b"") for one in found.fields if one.encode_name == field), None)
        elif not field and isinstance(found, ListType):
            found = found.item_type
        elif not (field and isinstance(found, UnionType)):
            return None
    return found


def _resolve_union(kind: Type, body: bytes) -> Type:
    """Returns the only type of an optional one, and of tagged objects the one that the body names."""
    if not isinstance(kind, UnionType):
        return kind
    kinds = [one for one in kind.types if not isinstance(one, NoneType)]
    if len(kinds) == 1:
        return kinds[0]
    tags = {one.tag: one for one in kinds if isinstance(one, StructType)}
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return tags[msgspec.json.decode(given[_tag_field(kind)], type=str)]
    except (msgspec.MsgspecError, KeyError, UnicodeError, RecursionError):  # the rest of the body may be invalid too
        return kind


def _tag_field(kind: UnionType) -> str:
    return next((one.tag_field for one in kind.types if isinstance(one, StructType) and one.tag_field), "")


def _field_advice(kind: Type | None, missing: str) -> str:
    """Returns advice on the fields to send."""
    if isinstance(kind, UnionType) and missing == _tag_field(kind):
        return _value_advice(kind, missing)
    if not isinstance(kind, StructType):
        return ""
    needed = [field.encode_name for field in kind.fields if field.required]
    if kind.tag_field:
        needed.insert(0, kind.tag_field)
    others = ", ".join(field.encode_name for field in kind.fields if not field.required)
    if not needed:
        return f"send any of {others}"
    return f"send {', '.join(needed)}" + (f", and optionally {others}" if others else "")


def _value_advice(kind: Type | None, path: str) -> str:
    """Returns advice on the values to send."""
    values: list[Any] = []
    if isinstance(kind, LiteralType):
        values = list(kind.values)
    elif isinstance(kind, UnionType) and path.removeprefix(".") == _tag_field(kind):
        values = [one.tag for one in kind.types if isinstance(one, StructType)]
    choices = [json.dumps(value) for value in values]
    if len(choices) > 2:
        return f"send one of {', '.join(choices)}"
    return f"send {' or '.join(choices)}" if choices else ""


def _json_names(types: str) -> str:
    return " or ".join(JSON_NAMES.get(name, f"`{name}`") for name in types.split(" | "))


def _first_not_finite(parsed: Any) -> str | None:
    """Returns the path of the first NaN or Infinity in parsed JSON; one walk, whose names are made at its end."""
    path, levels = list[int | str](), [_members([parsed])]
    while levels:
        for key, value in levels[-1]:
            if isinstance(value, dict | list):
                path.append(key)
                levels.append(_members(value))
                break
            if isinstance(value, float) and not math.isfinite(value):
                return "".join(map(_part, [*path, key][1:]))
        else:
            levels.pop()
            del path[-1:]
    return None


def _members(value: Any) -> Iterator[tuple[int | str, Any]]:
    return iter(value.items() if isinstance(value, dict) else enumerate(value))


def _part(key: int | str) -> str:
    return f"[{key}]" if isinstance(key, int) else f".{excerpt(key)}"
