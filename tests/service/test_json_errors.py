"""Errors in JSON requests: they name the place, say what is wrong, and what to send instead."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest

from cellserve.service.errors import InvalidInput, NotJson
from cellserve.service.validation.json_input import decode


class Item(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    size: int = 0


class Request(msgspec.Struct, forbid_unknown_fields=True):
    x: list[list[float]]
    mode: Literal["fast", "slow"] | None = None
    items: list[Item] = []
    count: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Open(msgspec.Struct, tag_field="op", tag="open", forbid_unknown_fields=True):
    model: str


class Step(msgspec.Struct, tag_field="op", tag="step", forbid_unknown_fields=True):
    session: int
    mode: Literal["fast", "slow", "idle"] | None = None


def error_of(kind: Any, body: str | bytes, **more: str) -> InvalidInput | NotJson:
    decoder = msgspec.json.Decoder(kind)
    with pytest.raises((InvalidInput, NotJson)) as raised:
        decode(decoder, body.encode() if isinstance(body, str) else body, **more)
    error = raised.value
    assert isinstance(error, InvalidInput | NotJson)
    return error


@pytest.mark.parametrize(
    ("body", "place", "detail"),
    [
        ('{"x": [[1, 2], [3, "4"]]}', "x[1][1]", "x[1][1]: expected a number, got a string"),
        ('{"x": [1]}', "x[0]", "x[0]: expected an array, got an integer"),
        ('{"x": {}}', "x", "x: expected an array, got an object"),
        ('{"x": [], "count": -1}', "count", "count: expected an integer >= 0"),
        ('{"x": [], "items": [{"name": "a"}, {"name": null}]}', "items[1].name", "expected a string, got null"),
    ],
)
def test_a_wrong_type_is_named_with_its_place_and_both_types(body: str, place: str, detail: str) -> None:
    error = error_of(Request, body)
    assert error.extensions["place"] == place
    assert detail in error.detail


@pytest.mark.parametrize(
    ("body", "place", "detail"),
    [
        ("{}", "x", "x: missing: send x, and optionally mode, items, count"),
        ('{"x": [], "y": 1}', "y", "y: unknown field: send x, and optionally mode, items, count"),
        ('{"x": [], "items": [{}]}', "items[0].name", "items[0].name: missing: send name, and optionally size"),
        ("[]", "", "expected an object, got an array: send x, and optionally mode, items, count"),
    ],
)
def test_a_missing_or_unknown_field_is_named_with_the_known_ones(body: str, place: str, detail: str) -> None:
    error = error_of(Request, body)
    assert (error.extensions.get("place", ""), error.detail) == (place, detail)


def test_a_value_that_is_not_allowed_is_named_with_the_allowed_ones() -> None:
    error = error_of(Request, '{"x": [], "mode": "quick"}')
    assert (error.extensions["place"], error.detail) == (
        "mode",
        'mode: \'quick\' is not one of its values: send "fast" or "slow"',
    )


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ('{"op": "fly"}', 'op: \'fly\' is not one of its values: send "open" or "step"'),
        ("{}", 'op: missing: send "open" or "step"'),
        ('{"op": "open"}', "model: missing: send op, model"),
        ('{"op": "open", "model": "a", "x": 1}', "x: unknown field: send op, model"),
        ('{"op": "step", "session": 1, "mode": "x"}', 'send one of "fast", "idle", "slow"'),
    ],
)
def test_the_advice_for_tagged_objects_is_that_of_the_tag_sent(body: str, detail: str) -> None:
    assert detail in error_of(Open | Step, body).detail


def test_a_place_inside_a_request_and_its_advice_are_in_the_message() -> None:
    error = error_of(list[list[float]], "[[1], 2]", place="sequences", advice="a sequence is a list of numbers")
    assert error.detail == "sequences[1]: expected an array, got an integer: a sequence is a list of numbers"
    assert error.extensions["place"] == "sequences[1]"


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_named_with_its_place(number: str) -> None:
    error = error_of(Request, f'{{"x": [[1, {number}]]}}')
    assert (error.extensions["place"], error.detail) == (
        "x[0][1]",
        "x[0][1]: not a finite number that float32 can hold",
    )


@pytest.mark.parametrize("body", [b"", b"{", b'{"x": [[1,]]}', b"\xff", b'{"x": [], "mode": "\xff"}'])
def test_what_is_not_json_is_told_apart_from_what_is_invalid(body: bytes) -> None:
    error = error_of(Request, body)
    assert isinstance(error, NotJson)
    assert "send a JSON document in UTF-8" in error.detail


def test_deep_nesting_is_an_error_like_any_other() -> None:
    assert "nested too deeply" in error_of(Any, b"[" * 100_000).detail


def test_long_names_are_shortened() -> None:
    assert len(error_of(Request, json.dumps({"x": [], "y" * 10_000: 1})).detail) < 300
