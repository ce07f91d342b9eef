"""Names that stand twice in a header, in any spelling, and headers that are too large."""

from __future__ import annotations

import struct

import pytest
from safetensors.numpy import load

from cellserve.service.validation.safetensors_header import LARGEST_HEADER, BadHeader, check_size, read_header

TENSOR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def document(header: str) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + bytes(4)


@pytest.mark.parametrize("again", ['"a"', '"\\u0061"'])
def test_a_name_that_stands_twice_is_refused(again: str) -> None:
    content = document(f'{{"a":{TENSOR},{again}:{TENSOR}}}')
    assert len(load(content)) == 1  # the library takes the last
    with pytest.raises(BadHeader, match="'a' stands twice"):
        read_header(content)
    with pytest.raises(BadHeader, match="'digest' stands twice"):
        read_header(document(f'{{"__metadata__":{{"digest":"1","digest":"2"}},"a":{TENSOR}}}'))
    assert read_header(document(f'{{"a":{TENSOR}}}')).keys() == {"a"}


def test_a_large_header_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(BadHeader):
        check_size(struct.pack("<Q", LARGEST_HEADER + 1))
    check_size(struct.pack("<Q", LARGEST_HEADER))
    check_size(b"")
