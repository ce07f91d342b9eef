"""HPACK (RFC 7541), as far as it takes to count a block's fields: nothing is decoded."""

from __future__ import annotations


def count_fields(block: bytes, most: int) -> int:
    """Returns how many fields and table sizes a header block has, or more than `most` if they cannot be read.

    Args:
        block: The fields as they are sent.
        most: Counting ends beyond it.
    """
    at, count = 0, 0
    try:
        while at < len(block) and count <= most:
            count += 1
            first = block[at]
            if first >= 0x80:  # an indexed field (section 6.1)
                at = _integer(block, at, 0x7F)[1]
            elif 0x20 <= first < 0x40:  # a table's size (section 6.3)
                at = _integer(block, at, 0x1F)[1]
            else:  # a literal (section 6.2), its name in a table unless the index is 0
                index, at = _integer(block, at, 0x3F if first >= 0x40 else 0x0F)
                for _ in range(1 if index else 2):
                    length, at = _integer(block, at, 0x7F)
                    at += length
    except IndexError:
        return most + 1
    return count if at == len(block) else most + 1


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Returns an integer (section 5.1) and where it ends; raises IndexError."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for shift in range(0, 28, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError
