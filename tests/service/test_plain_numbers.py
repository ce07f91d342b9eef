"""Sequences read with simdjson: the same numbers as through Python's, and nothing else is taken for them."""

import json
from typing import Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellserve.service.validation.plain_numbers import read_sequences

# Denormal numbers are zeros here and in the server: a test that has opened a model has set the processor's flag.
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(-3e38, 3e38, allow_nan=False, allow_subnormal=False)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(st.integers(1, 4).flatmap(lambda width: st.tuples(st.just(width), st.lists(
    st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=1, max_size=3), max_size=3
))))  # fmt: skip
def test_reads_the_numbers_that_python_reads(drawn: tuple[int, list[list[list[float]]]]) -> None:
    width, sequences = drawn
    read = read_sequences(json.dumps(sequences).encode(), width)
    assert read is not None
    x, lengths = read
    expected = [np.array(row, np.float64).astype(np.float32) for sequence in sequences for row in sequence]
    assert x.dtype == np.float32 and x.shape == (len(expected), width)
    assert x.tobytes() == b"".join(row.tobytes() for row in expected)
    assert lengths == list(map(len, sequences))


@given(npst.arrays(np.float32, (3, 2), elements=FLOATS))
def test_every_float32_survives(x: Any) -> None:
    read = read_sequences(json.dumps([x.tolist()]).encode(), 2)
    assert read is not None and read[0].tobytes() == x.tobytes()


@pytest.mark.parametrize(
    "text",
    [
        "[[[1,2],[3]]]",  # ragged
        "[[[1,2,3],[4]]]",  # ragged, with the right count of numbers
        "[[[1,[2]]]]",  # too deep, with the right count of numbers
        "[[[1],[2]]]",
        "[[1,2]]",  # not deep enough
        "[[[1,2],3,4]]",
        "[[[1,2]],[]]",  # an empty sequence
        "[[[]]]",
        '[[[1,"2"]]]',
        '[[[1,{"a":2}]]]',
        "[[[1,true]]]",
        "[[[1,null]]]",
        "[[[1,NaN]]]",
        "[[[1,1e39]]]",  # beyond float32
        "[[[1,1e400]]]",
        "[[[1,18446744073709551616]]]",
        "[[[1,01]]]",
        "[[[1,2]]] x",
        '{"a":[[1,2]]}',
        "3",
        "null",
        "",
        "[[[1,2]]",
    ],
)
def test_anything_else_is_left_to_the_reader_that_explains(text: str) -> None:
    assert read_sequences(text.encode(), 2) is None
    assert read_sequences(b"[[[1,2]]]", 2) is not None, "the parser is free again"
